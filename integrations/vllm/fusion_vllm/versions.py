"""The releases of vLLM whose hooks are known."""

from __future__ import annotations

import re
import warnings

KNOWN = ("0.32",)
"""Those that the tests run; see docs/vllm.md."""


def is_known(version: str) -> bool:
    """Whether the hooks of a release are known."""
    release = re.match(r"\d+\.\d+", version)
    return release is not None and release.group() in KNOWN


def warn(version: str) -> None:
    """Say that a release is not known."""
    words = (
        f"fusion_core: vLLM is {version}, needs {' or '.join(KNOWN)}: nothing is fused; docs/vllm.md has the releases"
    )
    warnings.warn(words, RuntimeWarning, stacklevel=3)
