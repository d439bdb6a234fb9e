"""A backend for tests of measuring: right ways to run a bare all_reduce, and every way to be wrong on one rank alone."""

import torch
import torch.distributed as dist

from fusion_core import Attribute, Reason, Strategy, hookimpl
from fusion_core.fallback import fell_back

ADD = "all_reduce_add_rms_norm"
GROUP_FP8 = "all_reduce_rms_norm_group_fp8"


def right(x, *, group):
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))


def raises_on_rank_1(x, *, group):
    if dist.get_rank() == 1:
        raise RuntimeError("no memory is left\nand more lines")
    return x.clone()


_calls = []


def raises_when_timed(x, *, group):
    """On rank 0 alone, and not in its first call; what is captured waits for nobody."""
    _calls.append(group)
    if len(_calls) == 1:
        return right(x, group=group)
    if dist.get_rank() == 0:
        raise RuntimeError("not in a capture")
    return x


_timed = []
_exits = []
_fallen = []


def raises_in_a_later_repetition(x, *, group):
    """On rank 1 alone, when it has been run, recorded and timed once."""
    _timed.append(group)
    if dist.get_rank() == 1 and len(_timed) > 1 + 3 * 5:
        raise RuntimeError("the third repetition")
    return x if len(_timed) > 1 else right(x, group=group)


def exits_when_timed(x, *, group):
    """On rank 0 alone."""
    _exits.append(None)
    if dist.get_rank() == 0 and len(_exits) > 1:
        raise SystemExit("enough")
    return right(x, group=group) if len(_exits) == 1 else x


def sums_nothing(x, *, group):
    return x.clone()


def not_a_number_on_rank_1(x, *, group):
    return right(x, group=group) * (float("nan") if dist.get_rank() == 1 else 1.0)


def falls_back(x, *, group):
    if dist.get_rank() == 1:
        fell_back("acme.falls_back", group, Reason("workspace", "no memory is left", "64 MiB"))
    return right(x, group=group)


def falls_back_when_timed(x, *, group):
    """On rank 1 alone, when it has been recorded."""
    _fallen.append(group)
    if dist.get_rank() == 1 and len(_fallen) > 1 + 5:
        fell_back("acme.falls_back_when_timed", group, Reason("workspace", "it is gone", "64 MiB"))
    return right(x, group=group)


class RankZero:
    """Met on rank 0 alone, as a wrong plugin's condition may be."""

    def unmet(self, site):
        return None if dist.get_rank() == 0 else Reason("rank", "this is another rank", "rank 0")

    def __str__(self):
        return "rank 0"


def with_norm(x, residual, weight, eps, *, weight_bias=0.0, residual_dtype=None, norm_dtype=None, group):
    total = right(x, group=group) + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (weight.float() + weight_bias)
    return wide.to(total.dtype), total


def of_groups(x, weight, eps, *, group, **scalars):
    raise AssertionError("declared, and never called")


@hookimpl
def fusion_strategies():
    for impl in (
        right,
        raises_on_rank_1,
        raises_when_timed,
        raises_in_a_later_repetition,
        exits_when_timed,
        sums_nothing,
        not_a_number_on_rank_1,
        falls_back,
        falls_back_when_timed,
    ):
        yield Strategy("all_reduce", f"acme.{impl.__name__}", impl)
    yield Strategy("all_reduce", "acme.only_on_rank_0", right, requires=(RankZero(),))
    yield Strategy("all_reduce", "acme.switched_off", right, option="fast")
    yield Strategy(ADD, "acme.with_norm", with_norm, outputs=("normed", "residual_out"))
    packed = (Attribute("scale_format", "ue8m0_packed"),)
    for name, live in (("groups", ("quantized", "scale", "reduced")), ("groups_out", ("quantized", "scale", "normed", "reduced"))):  # fmt: skip
        yield Strategy(GROUP_FP8, f"acme.{name}", of_groups, requires=packed, outputs=live)
