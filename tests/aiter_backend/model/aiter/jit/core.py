"""The module whose presence tells AMD's ``aiter`` from PyPI's; without a GPU its import fails, as AITER's does."""

from aiter.jit.utils.chip_info import get_gfx_runtime

GFX = get_gfx_runtime()
