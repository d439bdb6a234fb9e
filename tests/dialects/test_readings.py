"""What a dialect may say of an operator: several words, written arguments, derived operands, conditions, refusals."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from fusion_core import (
    Check,
    Derived,
    Dialect,
    Earlier,
    FusionConfig,
    FusionPass,
    Only,
    Reading,
    Reason,
    Refusal,
    Registry,
    Stage,
    Strategy,
    TensorMeta,
    vocabulary,
)
from fusion_core.lift.dialects import CORE_DIALECTS
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.plugins.loader import check_dialect
from tests.support.graphs import Fused, fuse, plugin, registry

pytestmark = pytest.mark.usefixtures("one_rank")

PLAIN, ADD = "all_reduce_rms_norm", "all_reduce_add_rms_norm"
N, EPS = 16, 1e-5


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, r, w = (torch.randn(shape, generator=generator).bfloat16() for shape in ((6, N), (6, N), (N,)))
    return x, r, w


def reduce(x: Tensor) -> Tensor:
    return funcol.all_reduce(x * 1, "sum", torch.distributed.group.WORLD)


def norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return torch.nn.functional.rms_norm(x, (N,), weight, eps)


@torch.library.custom_op("acme_tests::add_norm", mutates_args=())
def add_norm(hidden: Tensor, skip: Tensor, gamma: Tensor, epsilon: float, mode: str = "rms") -> tuple[Tensor, Tensor]:
    """The norm of a sum, and the sum."""
    total = hidden + skip
    return norm(total, gamma, epsilon), total


@add_norm.register_fake
def _(hidden: Tensor, skip: Tensor, gamma: Tensor, epsilon: float, mode: str = "rms") -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden)


@torch.library.custom_op("acme_tests::norm_into", mutates_args=("out", "skip"))
def norm_into(out: Tensor, hidden: Tensor, skip: Tensor | None, gamma: Tensor, epsilon: float) -> None:
    """The norm of ``hidden``, or of its sum with ``skip``, which becomes the sum."""
    total = hidden if skip is None else skip.add_(hidden)
    out.copy_(norm(total, gamma, epsilon))


@torch.library.custom_op("acme_tests::quantize", mutates_args=())
def quantize(hidden: Tensor, scale: Tensor, bits: int) -> Tensor:
    """FP8 codes where ``bits`` is 8."""
    return (hidden.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


@quantize.register_fake
def _(hidden: Tensor, scale: Tensor, bits: int) -> Tensor:
    return torch.empty_like(hidden, dtype=torch.float8_e4m3fn)


LIBRARY = torch.library.Library("acme_tests", "FRAGMENT")
LIBRARY.define("norm.out(Tensor hidden, Tensor gamma, *, Tensor(a!) out) -> Tensor(a!)", tags=(torch.Tag.out,))
LIBRARY.impl("norm.out", lambda hidden, gamma, *, out: out.copy_(norm(hidden, gamma)), "CompositeExplicitAutograd")


ADD_NORM = (
    Reading("add", {"x": "hidden", "residual": "skip"}, {"dtype": None}, results={"sum": 1}),
    Reading(
        "rms_norm",
        {"x": Earlier("sum"), "weight": "gamma", "eps": "epsilon"},
        {"weight_bias": 0.0, "dtype": None},
        results={"normed": 0},
    ),
)

NORM_INTO = (
    Reading("add", {"x": "hidden", "residual": "skip"}, {"dtype": None}, {"sum": "skip"}, when="skip"),
    Reading(
        "rms_norm",
        {"x": Earlier("sum", otherwise="hidden"), "weight": "gamma", "eps": "epsilon"},
        {"weight_bias": 0.0, "dtype": None},
        results={"normed": "out"},
        notes={"spelling": "acme"},
    ),
)


def dtype_of(output: TensorMeta) -> torch.dtype:
    return output.dtype


def one_scale(scale: TensorMeta) -> Reason | None:
    return None if scale.shape == (1,) else Reason("scale", f"the scale is {scale}", "one number", "scale")


QUANTIZE = Reading(
    "quantize_static_fp8",
    {"x": "hidden", "scale": "scale", "dtype": Derived(dtype_of, 0)},
    {"fp8_max": None},
    results={"quantized": 0},
    needs=(Only("bits", 8), Check(one_scale, "scale")),
)


def using(monkeypatch: Any, readings: dict[str, Any], **config: Any) -> Registry:
    """A registry of a plugin with these readings and the patterns' own functions as strategies."""
    strategies = [Strategy(pattern.name, f"acme.{pattern.name}", pattern.function) for pattern in CORE_PATTERNS]
    point = plugin(
        monkeypatch,
        "acme",
        fusion_dialects=lambda: [Dialect("acme", {f"acme_tests::{name}": each for name, each in readings.items()})],
        fusion_strategies=lambda: strategies,
    )
    return registry(point, config=FusionConfig(**config))


def refused(fused: Fused) -> list[str]:
    refusals = [d for d in fused.site.decisions if d.stage is Stage.STRUCTURE]
    return [f"{reason.code}: {reason}" for decision in refusals for reason in decision.reasons]


@pytest.mark.parametrize(
    ("used", "live"),
    [((0, 1), {"normed", "residual_out"}), ((0,), {"normed"})],
    ids=["both results", "the norm alone"],
)
def test_an_operator_of_two_words_is_found_whichever_results_are_used(
    monkeypatch: Any, used: tuple[int, ...], live: set[str]
) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        results = add_norm(reduce(x), r, w, EPS)
        return tuple(results[index] for index in used)

    given = tensors()
    fused = fuse(model, *given, using=using(monkeypatch, {"add_norm": ADD_NORM}))
    assert fused.site.strategy == f"acme.{ADD}"
    assert set(fused.site.attributes["live"]) == live
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("v2", [False, True], ids=["auto_functionalized", "auto_functionalized_v2"])
@pytest.mark.parametrize("with_skip", [False, True])
def test_a_word_is_left_out_with_the_argument_that_makes_it(monkeypatch: Any, v2: bool, with_skip: bool) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        a, skip = reduce(x), r * 1 if with_skip else None
        out = torch.empty_like(a)
        norm_into(out, a, skip, w, EPS)
        return out, a if skip is None else skip

    given = tensors()
    with torch._inductor.config.patch(enable_auto_functionalized_v2=v2):
        fused = fuse(model, *given, using=using(monkeypatch, {"norm_into": NORM_INTO}))
    assert fused.site.strategy == f"acme.{ADD if with_skip else PLAIN}"
    assert fused.site.attributes["spelling"] == "acme"
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def test_an_operator_that_is_tagged_to_write_only_is_read(monkeypatch: Any) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        a = reduce(x)
        out = torch.empty_like(a)
        torch.ops.acme_tests.norm.out(a, w, out=out)
        return out

    operands, constants = {"x": "hidden", "weight": "gamma"}, {"eps": EPS, "weight_bias": 0.0, "dtype": None}
    reading = Reading("rms_norm", operands, constants, {"normed": "out"})
    given = tensors()
    fused = fuse(model, *given, using=using(monkeypatch, {"norm.out": reading}))
    assert fused.site.strategy == f"acme.{PLAIN}"
    torch.testing.assert_close(fused.results, model(*given), rtol=0.02, atol=0.02)


def quantised(bits: int, size: int) -> Any:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return quantize(norm(reduce(x), w), torch.full((size,), 0.05), bits)

    return model


@pytest.mark.parametrize(
    ("bits", "size", "why"),
    [
        (8, 1, ""),
        (4, 1, "bits: bits of acme_tests::quantize is 4, needs 8"),
        (8, 16, "scale: the scale is float32[16], needs one number"),
    ],
)
def test_an_operand_may_be_derived_and_conditions_say_why_not(monkeypatch: Any, bits: int, size: int, why: str) -> None:
    fused = fuse(quantised(bits, size), *tensors(), using=using(monkeypatch, {"quantize": QUANTIZE}))
    assert fused.site.strategy == ("acme.all_reduce_rms_norm" if why else "acme.all_reduce_rms_norm_static_fp8")
    if why:
        assert why in refused(fused)
    else:
        assert fused.site.attributes["fp8_dtype"] == torch.float8_e4m3fn


def test_a_derived_operand_may_be_a_reason_instead(monkeypatch: Any) -> None:
    reading = dataclasses.replace(
        QUANTIZE, operands={**QUANTIZE.operands, "dtype": Derived(lambda output: Reason("dtype", "no such codes"), 0)}
    )
    fused = fuse(quantised(8, 1), *tensors(), using=using(monkeypatch, {"quantize": reading}))
    assert fused.site.strategy == "acme.all_reduce_rms_norm"
    assert "dtype: no such codes" in refused(fused)


def test_an_operator_that_is_no_word_says_what_it_is(monkeypatch: Any) -> None:
    refusal = Refusal(("quantize_static_fp8",), "hidden", Reason("acme", "acme quantises at random", "another one"))
    fused = fuse(quantised(8, 1), *tensors(), using=using(monkeypatch, {"quantize": refusal}))
    assert fused.site.strategy == "acme.all_reduce_rms_norm"
    assert "acme: acme quantises at random, needs another one" in refused(fused)


def test_an_argument_that_the_reading_does_not_know_must_hold_its_default(monkeypatch: Any) -> None:
    def model(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return add_norm(reduce(x), r, w, EPS, "centred")

    fused = fuse(model, *tensors(), using=using(monkeypatch, {"add_norm": ADD_NORM}))
    assert fused.site.pattern == "all_reduce"
    assert "mode: mode of acme_tests::add_norm is centred, needs rms" in refused(fused)
    knowing = (dataclasses.replace(ADD_NORM[0], ignored=("mode",)), ADD_NORM[1])
    assert fuse(model, *tensors(), using=using(monkeypatch, {"add_norm": knowing})).site.pattern == ADD


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"needs": (Check(one_scale, "scale"),)}, "leaves out its argument 'bits'"),
        ({"needs": (*QUANTIZE.needs, Only("bit", 8))}, "uses its argument 'bit'"),
        ({"results": {"quantized": 1}}, "uses its result 1, needs one of acme_tests::quantize"),
        ({"results": {"quantized": "out"}}, "uses its argument 'out'"),
    ],
)
def test_a_reading_that_does_not_fit_its_operator_is_named(monkeypatch: Any, changed: Any, why: str) -> None:
    readings = {"quantize": dataclasses.replace(QUANTIZE, **changed)}
    with pytest.warns(RuntimeWarning, match=f"dialect 'acme': reading of acme_tests::quantize {why}"):
        fused = fuse(quantised(8, 1), *tensors(), using=using(monkeypatch, readings))
    assert fused.site.pattern == PLAIN


@pytest.mark.parametrize(
    ("readings", "why"),
    [
        (ADD_NORM[1], r"rms_norm takes 'sum' of an earlier word, needs one of \[\]"),
        ((ADD_NORM[1], ADD_NORM[0]), "takes 'sum' of an earlier word"),
        ((dataclasses.replace(ADD_NORM[0], constants={}), ADD_NORM[1]), r"lacks \['dtype'\]"),
        (dataclasses.replace(QUANTIZE, results={"codes": 0}), r"gives \('codes',\), needs \('quantized',\)"),
        (Refusal(("quantise",), "hidden", Reason("acme", "no")), "the word is 'quantise', needs one of"),
    ],
)
def test_a_reading_that_does_not_fit_its_words_is_named_at_load(monkeypatch: Any, readings: Any, why: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"backend 'acme' not loaded: dialect 'acme', reading of .*{why}"):
        assert "acme" not in using(monkeypatch, {"add_norm": readings}).backends


def test_a_plugin_may_read_an_operator_of_the_library_otherwise(monkeypatch: Any) -> None:
    refusal = Refusal(("rms_norm",), "x", Reason("acme", "acme knows better"))
    point = plugin(monkeypatch, "acme", fusion_dialects=lambda: [Dialect("acme", {"vllm_ir::rms_norm": refusal})])
    dialects = registry(point).dialects
    assert [dialect.name for dialect in dialects] == [*(dialect.name for dialect in CORE_DIALECTS), "acme"]


@pytest.mark.parametrize("dialect", CORE_DIALECTS, ids=lambda dialect: dialect.name)
def test_a_dialect_of_the_library_fits_its_words(dialect: Dialect) -> None:
    check_dialect(dialect, {o.name: o for o in vars(vocabulary).values() if isinstance(o, vocabulary.Operation)})


def test_the_cache_key_holds_readings_their_functions_and_their_state(monkeypatch: Any) -> None:
    def key(reading: Reading, state: Any = None) -> str:
        dialect = Dialect("acme", {"acme_tests::quantize": reading}, state)
        return FusionPass(registry=registry(plugin(monkeypatch, "acme", fusion_dialects=lambda: [dialect]))).uuid()

    first = key(QUANTIZE)
    assert key(dataclasses.replace(QUANTIZE)) == first
    assert " at 0x" not in repr(CORE_DIALECTS)
    assert key(dataclasses.replace(QUANTIZE, needs=(Only("bits", 4), Check(one_scale, "scale")))) != first
    assert key(dataclasses.replace(QUANTIZE, needs=(Only("bits", 8), Check(one_other_scale, "scale")))) != first
    assert key(QUANTIZE, lambda: "one") != key(QUANTIZE, lambda: "two")


def one_other_scale(scale: TensorMeta) -> Reason | None:
    return None
