"""A model of AITER (ROCm/aiter at e4048607a5): the same names, numbers, refusals and corruptions, in torch on a CPU.

Stands for ``aiter.dist.device_communicators.custom_all_reduce.CustomAllreduce`` over a real gloo process group. It is
no mock: every rounding is that of the kernels on the architecture that ``GPU_ARCHS`` names (gfx942 or gfx950), and what
the kernels take without a check and turn into garbage is garbage here as well.

Three kinds of failure. What AITER raises is raised here with the same type. What makes its kernels wait for ever, read
or write beyond a buffer, or end the process, is an `AssertionError`. What only gives wrong numbers gives wrong numbers,
NaN where the kernels would show whatever lay in memory.

Known to differ: the sum of squares and the reciprocal square root are correctly rounded, where the kernels add in an
order of their own (with FMA) and may be one unit in the last place off. A NaN that meets an ``amax`` is left out of it
unless there is nothing else; in the kernels that depends on the lane. ``GPU_ARCHS`` is read at run time, where AITER
asks ``rocminfo``.
"""

from aiter._record import calls
from aiter.jit import core

__all__ = ["calls", "core"]
