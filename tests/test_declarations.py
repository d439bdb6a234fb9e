"""Declarations of strategies and variants: settled parameters, and what does not fit is refused with what would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_core import (
    Attribute,
    BackendError,
    FusionConfig,
    Strategy,
    Variant,
    WorldSize,
)
from tests.support.graphs import plugin, registry
from tests.variants import NORM, SUMS

pytestmark = pytest.mark.usefixtures("one_rank")


def normed(x: Tensor, weight: Tensor | None, eps: float, *, group: str) -> Any: ...


def test_a_settled_parameter_may_have_any_value_that_is_required() -> None:
    requires = (Attribute("weight_bias", 0.0, 1.0),)
    implied = Strategy(NORM.name, "acme.norm", normed, requires, outputs=("normed",)).implied(NORM)
    assert {each.name for each in implied if isinstance(each, Attribute)} == {"weight_bias", "norm_dtype"}
    settled = Strategy(NORM.name, "acme.norm", normed, requires, outputs=("normed",), settled=("weight_bias",))
    settled.check(NORM)
    assert {each.name for each in settled.implied(NORM) if isinstance(each, Attribute)} == {"norm_dtype"}


def declared(**fields: Any) -> Strategy:
    return replace(SUMS, **fields)


REFUSED: dict[str, tuple[Callable[[], Strategy], str]] = {
    "settled is unknown": (
        lambda: declared(settled=("eps",)),
        "strategy 'acme.sum' has settled ['eps'], needs some of (), the scalar parameters of 'all_reduce'",
    ),
    "settled is a text": (
        lambda: declared(settled="eps"),
        "strategy 'acme.sum' has settled 'eps', needs a tuple of names",
    ),
    "an argument of the pattern": (
        lambda: declared(arguments={"x": 1}),
        "strategy 'acme.sum' has arguments ['x'], which a site or the user gives; needs other names",
    ),
    "an argument of the user": (
        lambda: declared(variants=(Variant("few", {"max_tokens": 1}),)),
        "strategy 'acme.sum_few' has arguments ['max_tokens'], which a site or the user gives; needs other names",
    ),
    "an argument that impl lacks": (
        lambda: declared(variants=(Variant("few", {"shots": 1}),)),
        "strategy 'acme.sum_few' has arguments ['shots'], which its impl does not take: it is total(",
    ),
    "an argument that no graph can hold": (
        lambda: declared(variants=(Variant("few", {"lanes": torch.bfloat16}),)),
        "variant 'few' of strategy 'acme.sum' has arguments {'lanes': torch.bfloat16}, needs a mapping of names to "
        "numbers, text, True, False or None",
    ),
    "another class": (
        lambda: declared(variants=(SUMS,)),
        "needs a tuple of Variant objects",
    ),
    "two of one name": (
        lambda: declared(variants=(Variant("few"), Variant("few"))),
        "strategy 'acme.sum_few' is declared twice, needs a name of its own for each",
    ),
    "a name that a terminal obeys": (
        lambda: declared(variants=(Variant("\x1b[2J"),)),
        "the name of a variant of acme.sum is",
    ),
    "a rank of another type": (
        lambda: declared(variants=(Variant("few", rank=1.5),)),  # type: ignore[arg-type]
        "variant 'few' of strategy 'acme.sum' has rank 1.5, needs a whole number",
    ),
    "no requirement": (
        lambda: declared(variants=(Variant("few", requires=(WorldSize,)),)),  # type: ignore[arg-type]
        "among requires, needs requirements, which have unmet(site)",
    ),
    "nothing to call": (
        lambda: declared(variants=(Variant("few", impl=3),)),  # type: ignore[arg-type]
        "variant 'few' of strategy 'acme.sum' has impl 3, needs something to call or None",
    ),
    "outputs of another pattern": (
        lambda: declared(variants=(Variant("few", outputs=("normed",)),)),
        "strategy 'acme.sum_few' has outputs ['normed'], needs some of ('reduced',) of 'all_reduce'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_declaration_that_does_not_fit_is_refused_when_it_is_loaded(monkeypatch: Any, case: str) -> None:
    make, words = REFUSED[case]
    point = plugin(monkeypatch, "acme", fusion_strategies=lambda: [make()])
    with pytest.raises(BackendError) as error:
        registry(point, config=FusionConfig(strict=True))
    assert words in str(error.value)


def test_a_settled_parameter_that_impl_takes_is_refused() -> None:
    def biased(x: Tensor, weight: Tensor | None, eps: float, *, weight_bias: float = 0.0, group: str) -> Any: ...

    with pytest.raises(
        BackendError, match=r"has settled \['weight_bias'\], needs parameters that its impl does not take"
    ):
        Strategy(NORM.name, "acme.norm", biased, settled=("weight_bias",)).check(NORM)
