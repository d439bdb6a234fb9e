"""The CPU time of an eager call of our operator, against FlashInfer's function by hand."""

import time

import torch
import torch.distributed as dist
from ranks import slower
from site_columns import Outputs
from site_point import Point


def call_time(call, calls=2000, batches=5):
    """Microseconds of the CPU for one call, of the fastest batch: the GPU is not waited for within one."""
    best = float("inf")
    for _ in range(1 + batches):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls * 1e6)
    return best


def overhead(columns, pattern, hidden, tokens):
    """An eager call of ours against one of FlashInfer's by hand, microseconds of the CPU."""
    point = Point(pattern, hidden, tokens)
    point.produce()
    x, residual, operator = point.x, point.residual, columns.operator(point, False)
    outputs, call, empty_like = Outputs(point), columns.by_hand(point, True, False), torch.empty_like
    residual_in = residual if outputs.zeros is None else outputs.zeros
    old = {"norm_out": outputs.normed, "quant_out": outputs.quantized, "scale_out": outputs.scale}
    normed, quantized, scale = old.values()

    def by_hand():
        if not pattern.norms:
            call(output=empty_like(x))
            return
        call(
            residual_in=residual_in,
            residual_out=empty_like(x),
            norm_out=None if normed is None else empty_like(normed),
            quant_out=None if quantized is None else empty_like(quantized),
            scale_out=None if scale is None else empty_like(scale),
        )

    def preallocated():
        if pattern.norms:
            call(residual_in=residual_in, residual_out=outputs.turns[0], **old)
        else:
            call(output=outputs.turns[0])

    found = [call_time(each) for each in (lambda: operator(residual), by_hand, preallocated)]
    ours, hand, reused = (round(value, 2) for value in slower(found))
    return {
        "pattern": pattern.name,
        "hidden": hidden,
        "tokens": tokens,
        "fusion_core_us": ours,
        "flashinfer_us": hand,
        "flashinfer_preallocated_us": reused,
        "difference_us": round(ours - hand, 2),
    }
