"""Which kernel a call runs, and which calls the dispatchers refuse: functions of shapes, dtype and flags alone."""

from dataclasses import dataclass

import torch

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF)
FUSED_WORLD_SIZES = (2, 4, 8)
MOST_THREADS = 1024
TWO_STAGE_BYTES = 512 << 10
"""The most that the FP8 and MXFP4 kernels with two stages in one launch take."""


@dataclass(frozen=True)
class Launch:
    """A call of a fused operator, as its dispatcher sees it.

    Attributes:
        kind: ``"plain"``, ``"token_fp8"``, ``"group_fp8"`` or ``"mxfp4"``.
        dtype: Of the input; weight and residual are taken to have it too.
        m: Rows.
        n: The weight's width.
        input_n: The input's.
        out_n: The output's.
        world_size: Ranks.
        use_1stage: What the caller asked for.
        emits: Whether a copy in the input's dtype is wanted.
    """

    kind: str
    dtype: torch.dtype
    m: int
    n: int
    input_n: int
    out_n: int
    world_size: int
    use_1stage: bool
    emits: bool = False

    @property
    def pack(self) -> int:
        """Elements that a thread holds."""
        return 16 // self.dtype.itemsize

    @property
    def packs(self) -> int:
        """Threads of a row."""
        return self.n // self.pack

    def kernel(self) -> str:
        """``"1-stage"``, ``"2-stage"``, ``"split"``, or ``"nothing"`` where AITER prints a line and launches nothing.

        Raises:
            RuntimeError: AITER refuses.
        """
        self._check()
        fits = self.n % self.pack == 0 and self.packs <= MOST_THREADS
        one = self.use_1stage and fits and self.out_n // self.pack <= MOST_THREADS
        small = self.m * self.n * self.dtype.itemsize <= TWO_STAGE_BYTES
        if self.kind == "mxfp4":
            threads_fit = self.packs % self.world_size == 0 and not (self.emits and self.packs % 32)
            if not one and not (fits and threads_fit and small):
                raise RuntimeError(f"MXFP4 fused kernel: unsupported shape m={self.m} n={self.n}")
        self._check_world()
        if one:
            return "1-stage"
        if self.kind == "plain":
            if not 64 <= self.packs <= 2048:
                raise RuntimeError(
                    f"fused allreduce rmsnorm: n too {'small' if self.packs < 64 else 'large'}, {self.n}"
                )
            return "2-stage" if self.n % self.pack == 0 else "nothing"
        if not fits and self.kind == "group_fp8":
            raise RuntimeError("per-group quant fused kernel: unsupported n")
        return "nothing" if not fits else "2-stage" if small else "split"

    def lost_packs(self, kernel: str) -> int:
        """How many packs of the sum, at its end, nobody computes; the dispatchers do not look.

        Whole launches come with a rank's share rounded down. In the FP8 kernel with two stages in one launch the
        threads left over read a pointer of a rank that does not exist: all is lost.
        """
        everything = self.m * self.packs
        if kernel == "2-stage" and self.kind in ("token_fp8", "group_fp8"):
            return everything if self.packs % self.world_size else 0
        return everything % self.world_size if kernel in ("2-stage", "split") else 0

    def _check(self) -> None:
        if self.dtype not in (HALF if self.kind in ("group_fp8", "mxfp4") else FLOATS):
            raise RuntimeError(f"custom allreduce ({self.kind}) does not support {self.dtype}")
        if not self.m * self.n:
            raise RuntimeError("HIP error: invalid configuration argument (an empty grid)")
        if self.m * self.n % self.pack:
            raise RuntimeError(f"custom allreduce currently requires input length to be multiple of {self.pack}")
        if self.out_n < self.n or self.out_n % self.pack:
            raise RuntimeError(
                f"fused allreduce rmsnorm requires out_hidden_dim >= hidden_dim and divisible by {self.pack}"
            )

    def _check_world(self) -> None:
        if self.world_size not in FUSED_WORLD_SIZES:
            raise RuntimeError(f"fused allreduce rmsnorm: unsupported world_size={self.world_size}")


def check_all_reduce(numel: int, dtype: torch.dtype) -> None:
    """What the dispatcher of the plain all-reduce refuses.

    Raises:
        RuntimeError: It does.
    """
    if dtype not in FLOATS:
        raise RuntimeError("custom allreduce only supports float32, float16 and bfloat16")
    if not numel:
        raise RuntimeError("HIP error: invalid configuration argument (an empty grid)")
    if numel % (16 // dtype.itemsize):
        raise RuntimeError(f"custom allreduce currently requires input length to be multiple of {16 // dtype.itemsize}")
