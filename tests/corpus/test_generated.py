"""Spellings drawn part by part: none is missed, and none with a wrong turn is taken for the chain.

Several places are compiled as one graph, each with tensors of its own: most of the time goes into the compilation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_core import SiteReport
from tests.corpus import judging, parts, quantised
from tests.corpus.case import BARE, Given
from tests.corpus.parts import HIDDEN, RESIDUALS, UNROUNDED
from tests.corpus.quantised import Quantisation
from tests.corpus.spellings import WRONG, Spelling
from tests.corpus.wrong_turns import QUANTISATION_TURNS
from tests.support.graphs import fuse

pytestmark = pytest.mark.usefixtures("groups")

MOST = {torch.float8_e4m3fn: (448.0,), torch.float8_e4m3fnuz: (240.0, 224.0)}

names = st.sampled_from
epsilons = st.one_of(names((1e-5, 1e-6)), st.floats(math.log(1e-9), math.log(1e-1)).map(math.exp))


@st.composite
def quantisations(draw: st.DrawFn) -> Quantisation:
    kind = draw(names(("static", "token", "group")))
    dtype = draw(names(tuple(MOST)))
    clamp = draw(names(tuple(quantised.CLAMPS)))
    dynamic = kind != "static"
    return Quantisation(
        kind=kind,
        dtype=dtype,
        # a static scale says nothing of the largest code: without a clamp it is the dtype's own
        largest=draw(names(MOST[dtype])) if dynamic or clamp != "none" else torch.finfo(dtype).max,
        scaling=draw(names(tuple(quantised.SCALES))),
        clamp=clamp,
        maximum=draw(names(tuple(quantised.MAXIMA))) if dynamic else "abs().amax",
        least=draw(st.none() | st.tuples(names(tuple(quantised.LEASTS)), names((1e-12, 1e-4)))) if dynamic else None,
        size=draw(names((64, 32))) if kind == "group" else 64,
        groups=draw(names(("last", "flat"))) if kind == "group" else "last",
        power=draw(st.none() | names(tuple(quantised.POWERS))) if kind == "group" else None,
    )


@st.composite
def right(draw: st.DrawFn) -> Spelling:
    """A spelling that must be found."""
    quantisation = draw(st.none() | quantisations())
    residual = draw(st.none() | names((*RESIDUALS, UNROUNDED)))
    dtype = draw(names((torch.bfloat16, torch.float16, torch.float32)))
    cast = draw(names(parts.CASTS))
    outputs = ("normed", "reduced") if residual is None else ("normed", "residual_out", "reduced")
    live = draw(st.sets(names(outputs)))
    live |= {"quantized"} if quantisation else {"normed"}
    if residual == UNROUNDED:  # a sum that is never rounded is another place
        live |= {"residual_out"}
    if quantisation and quantisation.kind != "static" and (quantisation.power or draw(st.booleans())):
        live |= {"scale"}
    return Spelling(
        residual=residual,
        mean=draw(names(tuple(parts.MEANS))),
        shift=draw(names(tuple(parts.SHIFTS))),
        eps=draw(epsilons),
        inverse=draw(names(tuple(parts.INVERSES))),
        narrow=draw(names(tuple(parts.NARROW_PRODUCTS))),
        product=draw(names(tuple(parts.PRODUCTS))),
        weight=draw(st.none() | names(tuple(parts.WEIGHTS))),
        cast=cast,
        double=cast != "never round" and draw(st.booleans()),
        view=draw(names(tuple(parts.VIEWS))),
        quantisation=quantisation,
        live=tuple(sorted(live)),
        dtype=dtype,
    )


@st.composite
def wrong(draw: st.DrawFn) -> Spelling:
    """A spelling with one wrong turn."""
    turn = draw(names(tuple(WRONG)))
    spelling = draw(right().filter(WRONG[turn].fits))
    live = set(spelling.live)
    if turn in QUANTISATION_TURNS:  # their scales have shapes of their own
        live -= {"scale"}
    if turn == "another scale than the one given":
        live |= {"scale"}
    return dataclasses.replace(spelling, wrong=turn, live=tuple(sorted(live)))


def tensors(spelling: Spelling, scale: tuple[int, ...], seed: int) -> Given:
    return Given((3, HIDDEN), spelling.dtype, more=(lambda: torch.full(scale, 0.25),), seed=seed)


def places(of: st.SearchStrategy[Spelling]) -> st.SearchStrategy[list[tuple[Spelling, Given]]]:
    """Two or three places, that is as many sites of one graph: 100 examples are 200 spellings or more."""
    scales = names(((), (1,), (1, 1)))
    return st.lists(
        st.builds(lambda s, *a: (s, tensors(s, *a)), of, scales, st.integers(0, 2**16)), min_size=2, max_size=3
    )


@given(drawn=places(right()))
def test_no_spelling_is_missed(drawn: list[tuple[Spelling, Given]]) -> None:
    for (spelling, given_tensors), site, results in compiled(drawn):
        assert site.pattern == spelling.pattern, judging.refusals(site)
        assert site.strategy == f"reference.{spelling.pattern}", judging.refusals(site)
        assert set(site.attributes["live"]) == set(spelling.live)
        judging.check_attributes(site, spelling.attributes, weight=spelling.weight is not None)
        check_values(spelling, given_tensors, results)


@given(drawn=places(wrong()))
def test_no_wrong_turn_is_taken_for_the_chain(drawn: list[tuple[Spelling, Given]]) -> None:
    for (spelling, given_tensors), site, results in compiled(drawn):
        assert site.pattern == spelling.stands, site.attributes
        if spelling.stands != BARE:
            judging.check_attributes(site, spelling.attributes, weight=spelling.weight is not None)
        check_values(spelling, given_tensors, results)


def compiled(drawn: list[tuple[Spelling, Given]]) -> list[tuple[tuple[Spelling, Given], SiteReport, dict[str, Tensor]]]:
    """Each place with its site and its results, all from one graph."""

    def model(*inputs: Tensor) -> Any:
        return [place(*inputs[4 * i : 4 * i + 4]) for i, (place, _) in enumerate(drawn)]

    fused = fuse(model, *(tensor for _, make in drawn for tensor in make()))
    assert len(fused.sites) == len(drawn)
    return list(zip(drawn, fused.sites, fused.results, strict=True))


def check_values(spelling: Spelling, make: Given, results: dict[str, Tensor]) -> None:
    """No result is further from float64 than without the library."""
    inputs = make()
    plain = spelling(*inputs)
    exact = judging.in_float64(spelling, tuple(tensor.double() for tensor in inputs))
    assert list(results) == list(plain)
    dynamic = "scale" in results
    powers = dynamic and spelling.quantisation.power and spelling.wrong not in QUANTISATION_TURNS
    for name in results:
        got, unfused, oracle = results[name], plain[name], exact[name]
        assert (got.dtype, got.shape) == (unfused.dtype, unfused.shape)
        if name == "quantized" and dynamic:
            allowed = max(1, 1.5 * dequantised_steps(plain, exact, make.dtype))
            assert dequantised_steps(results, exact, make.dtype) <= allowed
        elif name == "scale" and powers:
            zero = (got == 0) & (oracle == 0)  # a group of zeros has no least scale in some spellings
            logs = got[~zero].log2()  # a maximum on the edge of two powers may fall to either side
            assert logs.frac().eq(0).all()
            assert ((logs.double() - oracle[~zero].log2()).abs() <= 1).all()
        elif name == "scale":  # of one element each: what that was rounded by
            rounding = 2 * torch.finfo(make.dtype).eps * oracle.abs()
            allowed = torch.maximum(rounding, 1.5 * (unfused - oracle).abs())
            assert ((got - oracle).abs() <= allowed).all()
        else:
            judging.check_tensor(got, unfused, oracle, make.dtype)


def dequantised_steps(results: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype) -> float:
    """How far dequantised codes are from the oracle's, the norm's rounding aside, in code steps of the coarser scale."""
    values, steps = [], []
    for each in (results, exact):
        codes, scale = each["quantized"], each["scale"].double()
        scale = scale.repeat_interleave(codes.shape[-1] // scale.shape[-1], -1)
        values.append(codes.double() * scale)
        steps.append(judging.code_step(codes) * scale)
    rounding = torch.finfo(dtype).eps * values[1].abs()
    difference = ((values[0] - values[1]).abs() - rounding) / torch.maximum(*steps)
    return float(difference.nan_to_num(torch.inf).max())
