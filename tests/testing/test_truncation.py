"""The definition with truncation: toward zero at each value that is rounded, and nowhere that kernels do not truncate."""

from dataclasses import replace

import pytest
import torch

from fusion_core import Device
from fusion_core.patterns.plain import all_reduce_add_rms_norm
from fusion_core.testing import example_site
from fusion_core.testing.truncation import truncated, truncates

BF16 = torch.bfloat16


def site(arch, dtype=BF16):
    found = example_site(all_reduce_add_rms_norm, device=Device("cuda", arch))
    return replace(found, inputs={name: replace(meta, dtype=dtype) for name, meta in found.inputs.items()})


@pytest.mark.parametrize(("arch", "dtype", "expected"), [("gfx942", BF16, True), ("gfx942", torch.float16, False), ("gfx950", BF16, False), ("sm_90", BF16, False)])  # fmt: skip
def test_where_kernels_truncate(arch, dtype, expected):
    assert truncates(site(arch, dtype)) is expected


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_value_goes_toward_zero(one_rank, sign):
    step = 2.0**-7  # of bfloat16 from 1 to 2
    x = torch.full((2, 256), sign * (1 + step), dtype=BF16)
    residual = torch.full((2, 256), sign * 0.75 * step, dtype=BF16)  # the sum lies nearer to the next number
    given = {"x": x, "residual": residual, "weight": torch.ones(256, dtype=BF16)}
    found = truncated(all_reduce_add_rms_norm, site("gfx942"), given, one_rank)
    assert {value.dtype for value in found.values()} == {BF16}
    assert torch.equal(found["residual_out"], x)
    assert not torch.equal(x + residual, x), "rounded to the nearest it is another number"
