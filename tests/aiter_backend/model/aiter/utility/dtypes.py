"""The FP8 type of the architecture: E4M3 without negative zero (largest 240) on gfx942, OCP's (largest 448) since."""

import torch

from aiter.jit.utils.chip_info import get_gfx_runtime

fp8 = torch.float8_e4m3fnuz if get_gfx_runtime() == "gfx942" else torch.float8_e4m3fn
