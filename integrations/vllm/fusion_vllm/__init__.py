"""fusion_core in vLLM.

``vllm serve MODEL -tp 2 --additional-config '{"fusion_core": {}}'`` switches it on, with the fields of
`fusion_core.FusionConfig`. `report` returns what each worker's graphs became.

vLLM calls `register` in each of its processes, by the entry point group ``vllm.general_plugins``. Without plugins
(``VLLM_PLUGINS``), ``--compilation-config '{"inductor_passes": {"post_grad_custom_post_pass":
"fusion_vllm.fusion_pass"}}'`` runs the pass too, behind vLLM's own. Nothing here imports vLLM before vLLM is imported.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "vllm" in sys.modules:
    # vLLM looks a pass up in the module's own names, so a lazy attribute would not be found
    from fusion_vllm.graph_pass import VllmFusion

    fusion_pass = VllmFusion()

from fusion_vllm.worker_reports import WorkerReports, report

__all__ = ["WorkerReports", "register", "report"]


def register() -> None:
    """Let ``additional_config["fusion_core"]`` switch fusion on. Called once or several times in each process."""
    import vllm

    from fusion_vllm import hooks, versions

    if versions.is_known(vllm.__version__):
        hooks.install()
    else:
        versions.warn(vllm.__version__)


def __getattr__(name: str) -> Any:
    if name == "fusion_pass":
        raise AttributeError("fusion_vllm.fusion_pass needs vLLM: import vllm before fusion_vllm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
