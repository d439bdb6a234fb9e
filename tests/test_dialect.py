"""Operators of another framework, read as words of the vocabulary."""

import dataclasses
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
import torch

from fusion_core import Dialect, FusionConfig, PatternError, Reading, hookimpl, pattern
from fusion_core.vocabulary import all_reduce, operation
from tests.support.graphs import REFERENCE, fuse, plugin, registry
from tests.test_matching import ADD, reduce, tensors

pytestmark = pytest.mark.usefixtures("one_rank")


@torch.library.custom_op("fusion_core_tests::their_norm", mutates_args=())
def their_norm(gamma: torch.Tensor, hidden: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    """Another framework's RMSNorm, with names and order of its own."""
    return torch.nn.functional.rms_norm(hidden, gamma.shape, gamma, epsilon)


@their_norm.register_fake
def _(gamma: torch.Tensor, hidden: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("fusion_core_tests::min_max", mutates_args=())
def min_max(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator with two results, which no word of the library means."""
    return x.amin(-1), x.amax(-1)


@min_max.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.amin(-1), x.amax(-1)


@operation(results=("least", "most"))
def extremes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A word of the plugin's own."""
    return x.amin(-1), x.amax(-1)


@pattern(outputs=("least", "most", "reduced"))
def all_reduce_extremes(x: torch.Tensor, *, group: str) -> tuple[torch.Tensor, ...]:
    """A pattern of the plugin's own."""
    reduced = all_reduce(x, group)
    least, most = extremes(reduced)
    return least, most, reduced


NORM = Reading(
    "rms_norm",
    {"x": "hidden", "weight": "gamma", "eps": "epsilon"},
    constants={"weight_bias": 0.0, "dtype": None},
    results=("normed",),
)


def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return their_norm(w, total), total


def test_an_operator_of_a_dialect_is_found_by_its_meaning(monkeypatch: Any) -> None:
    theirs = plugin(
        monkeypatch, "their", fusion_dialects=lambda: [Dialect("their", {"fusion_core_tests::their_norm": NORM})]
    )
    given = tensors()
    fused = fuse(model, *given, using=registry(theirs, REFERENCE))
    assert fused.site.strategy == f"reference.{ADD}"
    assert fused.site.attributes["eps"] == 1e-6  # the operator's own default
    assert not [t for t in fused.targets() if "their_norm" in str(t)]
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def test_without_the_dialect_it_is_a_stranger() -> None:
    assert fuse(model, *tensors(), using=registry(REFERENCE)).site.pattern == "all_reduce"


def test_an_operator_with_several_results_is_read_and_fused_by_a_pattern_of_the_plugin(monkeypatch: Any) -> None:
    from fusion_core import Strategy

    reading = Reading("extremes", {"x": "x"}, results=("least", "most"))
    theirs = plugin(
        monkeypatch,
        "their",
        fusion_dialects=lambda: [Dialect("their", {"fusion_core_tests::min_max": reading})],
        fusion_patterns=lambda: [all_reduce_extremes],
        fusion_strategies=lambda: [Strategy("all_reduce_extremes", "their.own", all_reduce_extremes.function)],
    )

    def both(x: torch.Tensor) -> Any:
        least, most = min_max(reduce(x))
        return most - least

    x, _, _ = tensors()
    fused = fuse(both, x, using=registry(theirs, REFERENCE))
    assert (fused.site.pattern, fused.site.strategy) == ("all_reduce_extremes", "their.own")
    assert set(fused.site.attributes["live"]) == {"least", "most"}
    assert not [t for t in fused.targets() if "min_max" in str(t)]
    torch.testing.assert_close(fused.results, both(x))


def test_a_reading_with_an_argument_that_the_operator_lacks_is_an_error_that_shows_the_operator(
    monkeypatch: Any,
) -> None:
    wrong = dataclasses.replace(NORM, operands={**NORM.operands, "x": "hiden"})
    theirs = plugin(
        monkeypatch, "their", fusion_dialects=lambda: [Dialect("their", {"fusion_core_tests::their_norm": wrong})]
    )
    given = tensors()
    with pytest.warns(RuntimeWarning, match=r"dialect 'their'.*uses its argument 'hiden', needs one of .*hidden"):
        fused = fuse(model, *given, using=registry(theirs, REFERENCE))
    assert fused.site.pattern == "all_reduce"
    torch.testing.assert_close(fused.results, model(*given))
    with pytest.raises(Exception, match="uses its argument 'hiden'"):
        fuse(model, *given, using=registry(theirs, REFERENCE, config=FusionConfig(strict=True)))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"word": "rmsnorm"}, "the word is 'rmsnorm', needs one of add, add_bias, all_gather_shard, all_reduce, "),
        ({"constants": {"weight_bias": 0.0}}, r"lacks \['dtype'\] and has \[\] too many, needs rms_norm\("),
        ({"constants": {"weight_bias": 0.0, "dtype": None, "bias": 1}}, r"has \['bias'\] too many"),
        ({"results": ("result",)}, r"gives \('result',\), needs \('normed',\)"),
    ],
)
def test_a_reading_that_does_not_fit_its_word_is_named_at_load(
    monkeypatch: Any, changed: dict[str, Any], why: str
) -> None:
    reading = dataclasses.replace(NORM, **changed)
    theirs = plugin(
        monkeypatch, "their", fusion_dialects=lambda: [Dialect("their", {"fusion_core_tests::their_norm": reading})]
    )
    with pytest.warns(RuntimeWarning, match=f"backend 'their' not loaded: dialect 'their', reading of .*{why}"):
        assert "their" not in registry(theirs, REFERENCE).backends


def lacks_group(x: torch.Tensor) -> torch.Tensor:
    return all_reduce(x, "0")


def no_annotation(x, *, group: str) -> torch.Tensor:
    return all_reduce(x, group)


def no_all_reduce(x: torch.Tensor, *, group: str) -> torch.Tensor:
    return extremes(x)[0]


def plain_torch(x: torch.Tensor, *, group: str) -> torch.Tensor:
    return all_reduce(x, group).float()


def two_all_reduces(x: torch.Tensor, *, group: str) -> torch.Tensor:
    return all_reduce(all_reduce(x, group), group)


def of_a_constant_group(x: torch.Tensor, *, group: str) -> torch.Tensor:
    return all_reduce(x, "0")


def not_connected(x: torch.Tensor, y: torch.Tensor, *, group: str) -> torch.Tensor:
    all_reduce(x, group)
    return extremes(y)[0]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lacks_group, "needs a parameter 'group'"),
        (no_annotation, "'x' has no annotation"),
        (no_all_reduce, "needs exactly one collective word, such as all_reduce, and that first"),
        (plain_torch, "needs to call words of the vocabulary only"),
        (two_all_reduces, "needs exactly one collective word"),
        (of_a_constant_group, "needs all_reduce"),
        (not_connected, "takes nothing that comes before it"),
    ],
)
def test_a_function_that_is_no_pattern_is_an_error_that_says_why(function: Any, why: str) -> None:
    with pytest.raises(PatternError, match=why):
        pattern(outputs=("reduced",))(function)


def test_the_wrong_number_of_outputs_is_an_error() -> None:
    with pytest.raises(PatternError, match="returns 1 values, needs"):
        pattern(outputs=("one", "two"))(of_x)
    with pytest.raises(PatternError, match="needs names among its outputs"):
        pattern(outputs=("one",), returns=("two",))(of_x)


def of_x(x: torch.Tensor, *, group: str) -> torch.Tensor:
    return all_reduce(x, group)


def no_dialects() -> list[Dialect]:
    return []


def test_a_hook_that_is_not_marked_is_not_called(monkeypatch: Any) -> None:
    module = ModuleType("plugin_plain")
    module.fusion_strategies = lambda: 1 / 0  # type: ignore[attr-defined]
    module.fusion_dialects = hookimpl(no_dialects)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "plugin_plain", module)
    loaded = registry(EntryPoint("plain", "plugin_plain", "fusion_core.backends"))
    assert loaded.backends["plain"].strategies == ()
