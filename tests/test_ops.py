"""Patterns as eager functions: what they return, and clear errors for tensors that do not fit."""

import re
from typing import Any

import pytest
import torch

from fusion_core import BackendError, ConfigError, FusionConfig, ops
from fusion_core.patterns import CORE_PATTERNS

N = 64


@pytest.fixture
def given(one_rank: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, N, generator=generator).bfloat16() for _ in range(2))
    return {"x": x, "residual": residual, "weight": torch.rand(N, generator=generator).bfloat16(), "eps": 1e-6}


def arguments(pattern: Any, given: dict[str, Any]) -> dict[str, Any]:
    extra = {"scale": torch.tensor(0.01), "global_scale": torch.tensor(100.0), "post_eps": 1e-3}
    extra |= {"post_weight": given["weight"].flip(0), "y": given["residual"], "y_weight": given["weight"].flip(0)}
    extra |= {"bias": given["weight"] - 0.5}
    return {name: value for name, value in {**given, **extra}.items() if name in pattern.parameters}


@pytest.mark.parametrize("pattern", CORE_PATTERNS, ids=lambda pattern: pattern.name)
def test_every_pattern_has_an_eager_function_that_gives_its_definition(pattern: Any, given: dict[str, Any]) -> None:
    sized = {"group_size": 32} if "group_size" in pattern.parameters else {}
    values = arguments(pattern, given) | sized
    results = getattr(ops, pattern.name)(**values, outputs=pattern.outputs)
    wanted = pattern.function(**pattern.bind((), values), group=torch.distributed.group.WORLD.group_name)
    for got, expected in zip(
        results if isinstance(results, tuple) else (results,),
        wanted if isinstance(wanted, tuple) else (wanted,),
        strict=True,
    ):
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def test_by_default_the_norm_and_the_next_residual_come_back(given: dict[str, Any]) -> None:
    normed, residual_out = ops.all_reduce_add_rms_norm(given["x"], given["residual"], given["weight"], 1e-6)
    torch.testing.assert_close(residual_out, given["x"] + given["residual"])
    wide = residual_out.float()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * given["weight"].float()
    torch.testing.assert_close(normed, expected.bfloat16())


def test_a_norm_without_weight(given: dict[str, Any]) -> None:
    normed, _ = ops.all_reduce_rms_norm(given["x"], None, 1e-6)
    torch.testing.assert_close(normed.float().pow(2).mean(-1), torch.ones(3), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"residual": torch.zeros(2, N)}, "residual has shape (2, 64), needs x's, (3, 64)"),
        ({"weight": torch.zeros(N + 1)}, "weight has shape (65,), needs x's last size, (64,)"),
        ({"weight": torch.zeros(N, dtype=torch.int32)}, "weight is torch.int32, needs a floating dtype"),
        ({"x": torch.zeros(3, N, dtype=torch.int64)}, "x is torch.int64, needs a floating dtype"),
        ({"weight": torch.zeros(N, device="meta")}, "weight is on meta and x on cpu, needs one device for all"),
        ({"residual": None}, "residual is None, needs a tensor"),
        ({"residual": 1.0}, "residual is float, needs a tensor"),
        ({"x": torch.zeros(3, N, requires_grad=True)}, "x requires grad, needs torch.no_grad()"),
        ({"group": "tp"}, "group is 'tp', needs a ProcessGroup"),
        ({"outputs": ("norm",)}, "outputs are ('norm',), needs some of ('normed', 'residual_out', 'reduced')"),
        ({"outputs": ()}, "outputs are (), needs some of"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error_that_says_why(
    given: dict[str, Any], changed: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)):
        ops.all_reduce_add_rms_norm(**{**given, **changed})


@pytest.mark.parametrize("shape", [(N - 1,), (3, N), ()])
def test_a_bias_has_the_last_size(given: dict[str, Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"all_reduce_bias: bias has shape {shape}, needs x's last size")):
        ops.all_reduce_bias(given["x"], torch.zeros(shape).bfloat16())


def test_missing_and_unknown_arguments_show_the_definition(given: dict[str, Any]) -> None:
    for values in ({}, {**given, "epsilon": 1.0}):
        with pytest.raises(TypeError, match=r"all_reduce_add_rms_norm got .* needs all_reduce_add_rms_norm\(x"):
            ops.all_reduce_add_rms_norm(**values)


def test_an_unknown_pattern_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="all_reduce_group_norm"):
        ops.all_reduce_group_norm  # noqa: B018


def test_with_no_backend_the_error_lists_why(given: dict[str, Any]) -> None:
    with pytest.raises(
        BackendError, match="no strategy can run all_reduce_add_rms_norm here: no backend in use has one"
    ):
        ops.all_reduce_add_rms_norm(**given, config=FusionConfig(order=()))


def test_without_a_process_group_the_error_says_what_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(ConfigError, match="not initialised, needs init_process_group"):
        ops.all_reduce(torch.zeros(2))
