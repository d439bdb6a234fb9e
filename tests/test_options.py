"""What a user sets for strategies: options that switch them on, and settings that their impl takes."""

import re
from dataclasses import fields
from typing import Any

import pytest
import torch

from fusion_core import BackendError, DType, FusionConfig, Reason, Stage, Strategy, ops, pattern
from fusion_core.config import SETTINGS
from fusion_core.dispatch.plan import Plan
from fusion_core.patterns.plain import all_reduce
from fusion_core.vocabulary import add
from fusion_core.vocabulary import all_reduce as reduced
from tests.acme import KERNEL, acme, opaque
from tests.support.graphs import REFERENCE, fuse, plugin, registry
from tests.test_matching import ADD, add_then, norm, reduce, tensors

pytestmark = pytest.mark.usefixtures("one_rank")

OUTPUTS = ("normed", "residual_out")
ON = FusionConfig(options=("acme.fast",))
OFF = (
    "the option acme.fast is off; FusionConfig(options=('acme.fast',)) or FUSION_CORE_OPTIONS=acme.fast switches it on"
)


def optional(**declared: Any) -> Strategy:
    return Strategy(ADD, "acme.add", opaque, outputs=OUTPUTS, option="fast", **declared)


def decided(fused: Any) -> tuple[Stage, list[str]]:
    decision = next(d for d in fused.site.decisions if d.strategy == "acme.add")
    return decision.stage, [str(reason) for reason in decision.reasons]


@pytest.fixture
def eager_uses(monkeypatch: Any) -> Any:
    """Makes eager functions use these entry points."""

    def use(*points: Any) -> None:
        monkeypatch.setattr(ops, "_registry_for", lambda config: registry(*points, config=config))
        monkeypatch.setattr(ops, "_chosen", {})

    return use


def test_a_strategy_behind_an_option_runs_where_the_user_switched_it_on(monkeypatch: Any) -> None:
    point = acme(monkeypatch, optional())
    on = fuse(add_then(norm), *tensors(), using=registry(point, REFERENCE, config=ON))
    assert on.site.strategy == "acme.add"
    off = fuse(add_then(norm), *tensors(), using=registry(point, REFERENCE))
    assert off.site.strategy == f"reference.{ADD}"
    assert decided(off) == (Stage.OPTION, [OFF])
    assert f"  option: {OFF} (at all_reduce)" in str(off.reports[0]).splitlines()


@pytest.mark.parametrize(("stage", "what"), [(Stage.REQUIRES, "requires"), (Stage.WORTHWHILE, "worthwhile")])
def test_whatever_else_speaks_against_it_is_said_before_its_option(monkeypatch: Any, stage: Stage, what: str) -> None:
    half = optional(**{what: (DType("x", torch.float16),)})
    fused = fuse(add_then(norm), *tensors(), using=registry(acme(monkeypatch, half)))
    assert decided(fused) == (stage, ["x is bfloat16, needs float16"])


def test_a_backend_that_cannot_be_used_is_said_before_the_option(monkeypatch: Any) -> None:
    absent = plugin(
        monkeypatch,
        "acme",
        fusion_strategies=lambda: [optional()],
        fusion_available=lambda device: [Reason("driver", "found no driver", "one")],
    )
    fused = fuse(add_then(norm), *tensors(), using=registry(absent))
    assert decided(fused) == (Stage.UNAVAILABLE, ["found no driver, needs one"])


def test_an_eager_function_obeys_options(monkeypatch: Any, eager_uses: Any) -> None:
    eager_uses(acme(monkeypatch, optional()))
    x, r, w = tensors()
    torch.testing.assert_close(ops.all_reduce_add_rms_norm(x, r, w, 1e-5, config=ON), opaque(x, r, w, 1e-5, "0"))
    with pytest.raises(BackendError, match=re.escape(f"acme.add: {OFF}")):
        ops.all_reduce_add_rms_norm(x, r, w, 1e-5)


@torch.library.custom_op("fusion_core_tests::sized", mutates_args=())
def sized(x: torch.Tensor, group: str, max_tokens: int | None) -> torch.Tensor:
    return x.clone() if max_tokens is None else x * max_tokens


@sized.register_fake
def _(x: torch.Tensor, group: str, max_tokens: int | None) -> torch.Tensor:
    return torch.empty_like(x)


def _sized(x: torch.Tensor, *, group: str, max_tokens: int | None = 0) -> torch.Tensor:
    result: torch.Tensor = sized(x, group, max_tokens)
    return result


@pytest.mark.parametrize("impl", [sized, _sized], ids=["operator", "function"])
@pytest.mark.parametrize("capacity", [7, None])
def test_an_impl_that_takes_max_tokens_gets_the_users_as_a_constant_of_the_graph(
    monkeypatch: Any, eager_uses: Any, impl: Any, capacity: int | None
) -> None:
    """A constant, so that a graph from the compile cache has it wherever it runs."""
    point = acme(monkeypatch, Strategy("all_reduce", "acme.sized", impl))
    config = FusionConfig(max_tokens=capacity)
    x = torch.ones(4)
    fused = fuse(reduce, x, using=registry(point, config=config))
    (node,) = (n for n in fused.graphs[0].nodes if n.target is torch.ops.fusion_core.by_tokens_1.default)
    assert Plan.of(node.args[2]).settings == {"acme.sized": {"max_tokens": capacity}}
    assert fused.results.tolist() == [capacity or 1] * 4
    eager_uses(point)
    assert ops.all_reduce(x, config=config).tolist() == [capacity or 1] * 4


def test_an_impl_that_does_not_name_a_setting_is_not_given_it() -> None:
    def anything(x: torch.Tensor, **rest: Any) -> torch.Tensor:
        return x

    config = FusionConfig(max_tokens=7)
    assert Strategy("all_reduce", "acme.any", anything).settings(all_reduce, config) == {}
    assert KERNEL.settings(all_reduce, config) == {}


@pattern(outputs=("sum",))
def all_reduce_and_count(x: torch.Tensor, max_tokens: int, *, group: str) -> torch.Tensor:
    """A pattern with a parameter of a setting's name."""
    return add(reduced(x, group), max_tokens)


def test_a_parameter_of_the_pattern_is_the_patterns_whatever_its_name() -> None:
    strategy = Strategy("all_reduce_and_count", "acme.count", _sized)
    strategy.check(all_reduce_and_count)
    assert strategy.settings(all_reduce_and_count, FusionConfig(max_tokens=7)) == {}


def test_every_setting_is_a_field_of_the_config() -> None:
    assert set(SETTINGS) <= {field.name for field in fields(FusionConfig)}


def test_a_sum_without_a_dimension_is_one_token(monkeypatch: Any) -> None:
    point = acme(monkeypatch, Strategy("all_reduce", "acme.sized", _sized))
    fused = fuse(reduce, torch.ones(()), using=registry(point, config=FusionConfig(max_tokens=7)))
    assert float(fused.results) == 7.0
