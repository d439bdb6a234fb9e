"""The strategy that a dry run names at a site is the one that ``torch.compile`` then puts there.

One row of each pattern goes through all of Inductor, and its numbers are judged as well. All rows of the corpus are
asked in ``test_corpus.py``, up to the post-grad passes, in Inductor's own state (`tests.test_dispatch_state`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import fusion_core
from fusion_core import FusionPass, Report
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary.fp4 import dequantize_mxfp4, dequantize_nvfp4
from tests.corpus import judging
from tests.corpus.batches import Outcome, given, together
from tests.corpus.case import BARE, BIAS, SANDWICH, WIDE, Case, Given, layer_norm, reduce
from tests.corpus.placing import Placed, named, placed
from tests.dialects.test_flashinfer import MXFP4, quantize
from tests.properties.jobs import excess

pytestmark = pytest.mark.usefixtures("groups")


def chain(pattern: str) -> Callable[..., Any]:
    """A pattern as a model writes it. Numbers stand in it: with ``dynamic=True`` others would be symbols."""
    kind = pattern.rpartition("rms_norm")[2].removeprefix("_")

    def model(x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> Any:
        total = r + reduce(x) if "_add_" in pattern and pattern != SANDWICH else reduce(x)
        if pattern == SANDWICH:
            total = r + w * (torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-6) * total.float()).to(
                total.dtype
            )
        if pattern == BARE:
            return total * 2
        if pattern == BIAS:
            return total + w
        if "layer_norm" in pattern:
            return layer_norm(total, w, w), total
        wide = total.float()
        n = w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(total.dtype)
        if not kind:
            return n, total
        if kind == "nvfp4":
            return *quantize(n, s, is_sf_swizzled_layout=False), total
        if kind == "mxfp4":
            return *quantize(n, None, **MXFP4), total
        values = n.float().view(*n.shape[:-1], 2, 128) if kind == "group_fp8" else n.float()
        if kind != "static_fp8":
            s = values.abs().amax(-1, keepdim=True) / 448.0
        codes = (values / s).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(n.shape)
        return (codes, total) if kind == "static_fp8" else (codes, s.view(*n.shape[:-1], -1), total)

    return model


TENSORS = Given(shape=(3, WIDE), more=(lambda: torch.tensor([0.05]),))
ONE_OF_EACH = [  # `tests/sharded` has those that start from an all_gather
    Case(pattern.name, chain(pattern.name), pattern.name, given=TENSORS)
    for pattern in CORE_PATTERNS
    if pattern.collective == BARE
]


@dataclass
class Whole:
    """The rows of all patterns in one graph, explained, and compiled and run by all of Inductor."""

    explained: Report
    there: list[Placed]
    results: list[Any]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (torch.no_grad, False), id="no_grad-static", marks=pytest.mark.nightly
        ),  # the README's program is so
        pytest.param((torch.inference_mode, True), id="inference_mode-dynamic"),
        pytest.param((torch.no_grad, True), id="no_grad-dynamic", marks=pytest.mark.nightly),
        pytest.param((torch.inference_mode, False), id="inference_mode-static", marks=pytest.mark.nightly),
    ],
)
def whole(request: pytest.FixtureRequest, groups: str) -> Whole:
    around, dynamic = request.param
    there: list[Placed] = []
    run = FusionPass.run

    def looked(own: FusionPass, graph: fx.Graph) -> Report:
        report = run(own, graph)
        if not own.dry_run:
            there.append(placed(graph, report))
        return report

    function = together(ONE_OF_EACH)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(fx_graph_cache=False), around():
        patch.setattr(FusionPass, "run", looked)
        explained = fusion_core.explain(function, *given(ONE_OF_EACH), dynamic=dynamic)
        assert there == []
        compiled = torch.compile(function, backend="fusion_core", dynamic=dynamic, fullgraph=True)
        return Whole(explained, there, compiled(*given(ONE_OF_EACH)))


def test_all_of_inductor_places_what_explain_names(whole: Whole) -> None:
    assert whole.there == [named(whole.explained)]
    assert [site.strategy for site in whole.explained.sites] == [f"reference.{row.name}" for row in ONE_OF_EACH]


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=lambda row: row.name)
def test_its_numbers_are_as_near_to_float64(whole: Whole, row: Case) -> None:
    place = ONE_OF_EACH.index(row)
    results = whole.results[place]
    if not row.name.endswith("fp4"):
        judging.check_values(row, Outcome((), results, TENSORS(), []))
        return
    scale = TENSORS()[-1]
    dequantize = functools.partial(dequantize_nvfp4, global_scale=scale, scale_layout="linear")
    if row.name.endswith("mxfp4"):
        dequantize = functools.partial(dequantize_mxfp4)
    plain = row.function(*TENSORS())
    base, _ = row.name.rsplit("_", 1)
    _, (exact, total, *_) = judging.plain_and_exact(chain(base), TENSORS)
    values = [dequantize(codes, block_scales, dtype=torch.float64) for codes, block_scales, _ in (results, plain)]
    assert excess(*values, exact, torch.bfloat16) <= 1
    judging.check_tensor(results[-1], plain[-1], total, torch.bfloat16)
