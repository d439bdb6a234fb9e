"""The GPU's architecture: what ``GPU_ARCHS`` says, there being no ``rocminfo`` to ask."""

import functools
import os

MODELLED = ("gfx942", "gfx950")


@functools.cache
def get_gfx_runtime() -> str:
    """The one architecture of this process.

    Raises:
        RuntimeError: There is none, as where ``rocminfo`` is missing.
        KeyError: It has no model. (AITER knows more; of those only gfx942 and gfx950 have these kernels and support.)
    """
    arch = os.environ.get("GPU_ARCHS", "native")
    if arch == "native":
        raise RuntimeError("Get GPU arch from rocminfo failed: the model has no GPU, set GPU_ARCHS to gfx942 or gfx950")
    if arch not in MODELLED:
        raise KeyError(f"Unknown GPU architecture: {arch}. Supported architectures: {list(MODELLED)}")
    return arch
