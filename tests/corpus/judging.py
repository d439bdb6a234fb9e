"""What a row must come to: the site, its attributes, and values no further from float64 than without the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from fusion_core import SiteReport, Stage
from tests.corpus.batches import Outcome, Row
from tests.corpus.case import EPS, Case, Given, NearMiss
from tests.properties.jobs import excess
from tests.support import casts

CODES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.int8)
NARROW = (torch.float16, torch.bfloat16, torch.float32)

USUAL = {
    "eps": EPS,
    "weight_bias": 0.0,
    "norm_dtype": None,
    "residual_dtype": None,
    "fp8_dtype": torch.float8_e4m3fn,
    "group_size": 128,
    "scale_format": "float32",
    "scale_layout": "row_major",
}
NOTES = {"weight_after_cast": False, "norm_of_unrounded_sum": False}
"""Attributes that a site has only where they are true."""


def judge(case: Case, outcome: Outcome) -> None:
    """Check all that a row says."""
    site = expected_site(outcome, case.pattern, case.others)
    assert site.strategy == f"reference.{case.pattern}", refusals(site)
    assert set(site.attributes["live"]) == set(case.live)
    check_attributes(site, case.attributes, weight=case.weight, bias=case.bias)
    check_values(case, outcome, strides="scale_layout" in case.attributes)


def judge_near_miss(miss: NearMiss, outcome: Outcome) -> None:
    """Check that the longer pattern is refused, in words, and no value changed."""
    site = expected_site(outcome, miss.stands, miss.others)
    refused = [decision for decision in site.decisions if decision.pattern == miss.of]
    found = {str(reason) for decision in refused if decision.stage is Stage.STRUCTURE for reason in decision.reasons}
    assert any(miss.because in reason for reason in found), found
    check_values(miss, outcome)


def expected_site(outcome: Outcome, pattern: str, others: tuple[tuple[str, ...], tuple[str, ...]]) -> SiteReport:
    """The row's own site, among as many as it says."""
    before, behind = others
    found = [site.pattern for site in outcome.sites]
    assert found == [*before, pattern, *behind], [refusals(site) for site in outcome.sites]
    return outcome.sites[len(before)]


def refusals(site: SiteReport) -> dict[str, list[str]]:
    """Why not, for messages."""
    return {decision.pattern: [str(reason) for reason in decision.reasons] for decision in site.decisions}


def check_attributes(
    site: SiteReport, differing: Mapping[str, Any], *, weight: bool = True, bias: bool = False
) -> None:
    """The usual attributes but for those that a row names."""
    if "norm" not in site.pattern:
        return
    found = NOTES | dict(site.attributes)
    if "fp8_max" in found:
        found["fp8_max"] = found["fp8_max"] or torch.finfo(found["fp8_dtype"]).max
        assert found["fp8_max"] == differing.get("fp8_max", torch.finfo(found["fp8_dtype"]).max)
    if found.get("min_scale", 0.0) is None:
        found["min_scale"] = 1e-10 if found.get("scale_format") == "ue8m0" else 1 / (512 * found["fp8_max"])
    expected = {"min_scale": 0.0} | USUAL | NOTES | dict(differing)
    for name in expected:
        if name in casts.SAID_BY_CASTS and not casts.KEPT:
            continue
        if name in found or name in differing:
            value = expected[name]
            wanted = pytest.approx(value, rel=1e-6, abs=0) if isinstance(value, float) else value
            assert found.get(name) == wanted, (name, found.get(name), value)
    assert ("weight" in site.attributes["inputs"]) == weight
    assert ("bias" in site.attributes["inputs"]) == bias


def check_values(row: Row, outcome: Outcome, *, strides: bool = False) -> None:
    """Fused results, and what became of the inputs, against plain ones and float64."""
    found, (plain, exact) = tree_leaves((outcome.results, outcome.inputs)), plain_and_exact(row.function, row.given)
    for got, unfused, oracle in zip(found, plain, exact, strict=True):
        assert got.stride() == unfused.stride() or not strides
        check_tensor(got, unfused, oracle, row.given.dtype)


def plain_and_exact(function: Callable[..., Any], given: Given) -> tuple[list[Tensor], list[Tensor]]:
    """A function's results and its inputs behind it, without the library and in float64."""
    inputs, wide = given(), tuple(map(_widened, given()))
    return tree_leaves((function(*inputs), inputs)), tree_leaves((in_float64(function, wide), wide))


def check_tensor(got: Tensor, unfused: Tensor, oracle: Tensor, reduced: torch.dtype) -> None:
    """One result against the plain one and float64. The reduced sum's rounding is in every result."""
    assert (got.dtype, got.shape) == (unfused.dtype, unfused.shape)
    if got.dtype in CODES:
        assert code_steps(got, oracle) <= max(1, 1.5 * code_steps(unfused, oracle))
        return
    if not got.dtype.is_floating_point:
        assert got.equal(unfused)
        return
    coarsest = max(got.dtype, reduced, key=lambda dtype: torch.finfo(dtype).eps)
    # as one row: of a few elements alone the unfused model may have rounded well by chance
    assert excess(*(tensor.reshape(-1) for tensor in (got, unfused, oracle)), coarsest) <= 1


def code_steps(codes: Tensor, oracle: Tensor) -> float:
    """How far codes are from the oracle's, in the distance of neighbouring codes there."""
    assert codes.shape == oracle.shape
    found, exact = codes.double(), oracle.double()
    step = torch.maximum(code_step(codes), code_step(oracle))
    return float(((found - exact).abs() / step).nan_to_num(torch.inf).max()) if codes.numel() else 0.0


def code_step(codes: Tensor) -> Tensor:
    """The distance of neighbouring codes around each."""
    if codes.dtype is torch.int8:
        return torch.ones((), dtype=torch.float64)
    info = torch.finfo(codes.dtype)
    magnitude = codes.double().abs().clamp(min=info.smallest_normal)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def in_float64(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
    """A function's results with every floating dtype but FP8 taken for float64."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            return function(*inputs)
    finally:
        torch.set_default_dtype(torch.float32)


class _Float64(TorchFunctionMode):
    """Every cast to a narrower floating dtype goes to float64, and every narrower tensor is widened first."""

    CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.CASTS:
            return args[0].double()
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return function(*args, **kwargs)


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return torch.float64 if leaf in NARROW else leaf
    return leaf.to(torch.float64) if isinstance(leaf, Tensor) and leaf.dtype in NARROW else leaf
