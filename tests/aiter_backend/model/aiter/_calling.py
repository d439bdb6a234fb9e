"""A call from tensors to tensors: what AITER's C++ checks, the exchange with the other ranks, the kernel, the stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from aiter import _kernels
from aiter._dispatch import Launch, check_all_reduce
from aiter._exchange import agree, gather
from aiter._memory import check_aligned, read, rows, spoil, write
from aiter._pool import check_registered


def run_all_reduce(
    communicator: Any, inp: Tensor, allocate: Callable[[], Tensor], *, use_new: bool, registered: bool
) -> Tensor:
    """The plain all-reduce."""

    def prepare() -> tuple[Any, Tensor]:
        out = allocate()
        _check_open(communicator)
        check_registered(inp, None if registered else communicator._pool["input"].max_size)
        check_all_reduce(inp.numel(), inp.dtype)
        check_aligned(out=out, inp=inp if registered else None)
        return ("all_reduce", inp.dtype, inp.numel(), use_new, registered), out

    out = agree(communicator.group, prepare)
    inputs = gather(communicator.group, read(inp, inp.numel(), inp.dtype))
    write(out, _kernels.all_reduce(inputs, use_new=use_new))
    _forget(communicator, registered, (out,))
    return out


def run_fused(
    communicator: Any,
    kind: str,
    allocate: Callable[[], tuple[Tensor, ...]],
    inp: Tensor,
    res_inp: Tensor,
    w: Tensor,
    *,
    eps: float,
    registered: bool,
    use_1stage: bool,
    gemma: bool = False,
    group_size: int = 0,
    transposed: bool = False,
) -> tuple[Tensor, ...]:
    """A fused operator.

    Args:
        communicator: A `CustomAllreduce`.
        kind: See `Launch`.
        allocate: The outputs, in the order in which they are given back; may refuse by raising.
        inp: The input.
        res_inp: The residual: bytes that are read as the input's dtype, row after row.
        w: The weight, likewise; its size is the hidden size.
        eps: As given.
        registered: Whether peers read the input where it lies.
        use_1stage: As given.
        gemma: As given.
        group_size: As given.
        transposed: Whether scales are stored column by column.
    """

    def prepare() -> tuple[Any, tuple[Launch, str, Tensor, tuple[Tensor, ...]]]:
        outputs = allocate()
        _check_open(communicator)
        n = w.numel()
        # kernels with groups or blocks take the weight's size for the row, whatever the input's last dimension is
        input_n = inp.shape[-1] if kind in ("plain", "token_fp8") else n
        m = inp.numel() // input_n if input_n else 0
        out_n = outputs[0].shape[-1] if kind == "plain" else n
        _check_widths(kind, inp, res_inp, outputs, n)
        check_registered(inp, None if registered else communicator._pool["input"].max_size)
        emits = len(outputs) == 4
        launch = Launch(kind, inp.dtype, m, n, input_n, out_n, communicator.world_size, use_1stage, emits)
        kernel = launch.kernel()
        check_aligned(residual=res_inp, weight=w, inp=inp if registered else None)
        check_aligned(**{f"output {index}": each for index, each in enumerate(outputs)})
        # the one copy that does not look at strides at all is MXFP4's
        whole = read(inp, inp.numel(), inp.dtype) if registered or kind == "mxfp4" else rows(inp, m, input_n)
        data = whole[: m * input_n].view(m, input_n)
        return (kind, kernel, inp.dtype, (m, input_n), n, registered), (launch, kernel, data, outputs)

    launch, kernel, data, outputs = agree(communicator.group, prepare)
    results = _kernels.fused(
        launch,
        kernel,
        gather(communicator.group, data),
        read(res_inp, launch.m * launch.n, launch.dtype).view(launch.m, launch.n),
        read(w, launch.n, launch.dtype),
        eps=eps,
        gemma=gemma,
        group_size=group_size,
    )
    scale = results.scale.t() if transposed and results.scale is not None else results.scale
    for target, values in zip(outputs, (results.out, results.residual, scale, results.mirror), strict=False):
        if values is not None:
            write(target, values)
    _forget(communicator, registered, outputs)
    return outputs


def _check_open(communicator: Any) -> None:
    assert communicator._ptr, "the communicator is closed: its kernels would follow a null pointer"


def _check_widths(kind: str, inp: Tensor, res_inp: Tensor, outputs: tuple[Tensor, ...], n: int) -> None:
    """Only the plain operators look at the residual's last dimension."""
    if kind == "plain":
        if inp.shape[-1] < n:
            raise RuntimeError("fused allreduce rmsnorm pad requires input width >= weight width")
        if res_inp.shape[-1] != n or outputs[1].shape[-1] != n:
            raise RuntimeError("fused allreduce rmsnorm requires residual input/output width == weight width")
    elif kind == "token_fp8" and inp.shape[-1] != n:
        raise RuntimeError("fused allreduce rmsnorm quant requires input width == weight width")


def _forget(communicator: Any, registered: bool, outputs: tuple[Tensor, ...]) -> None:
    """Captured addresses that no `capture` exchanges: a replay reads what its peers never opened."""
    if registered and not communicator._IS_CAPTURING:
        for each in outputs:
            spoil(each)
