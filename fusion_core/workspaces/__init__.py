"""Memory that the ranks of a group share, for backends whose kernels need it.

A backend writes a `Provider`, which makes one workspace and calls kernels on it. `Workspaces` makes them when they are
first needed and keeps them per process group. If one rank of a group cannot have a workspace, all its ranks take the
unfused path. See ``docs/workspaces.md``.
"""

from fusion_core.agree.agreement import Agreement, NoAgreement
from fusion_core.workspaces.call import Call, Workspace
from fusion_core.workspaces.facts import too_little_memory
from fusion_core.workspaces.lifecycle import Workspaces
from fusion_core.workspaces.operator import register_operator
from fusion_core.workspaces.provider import Exchange, Provider

__all__ = [
    "Agreement",
    "Call",
    "Exchange",
    "NoAgreement",
    "Provider",
    "Workspace",
    "Workspaces",
    "register_operator",
    "too_little_memory",
]
