"""What workers do with one example: run it unfused, fused and in float64, and report what became of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusion_core
from fusion_core import FusionConfig, FusionPass, SiteReport, vocabulary
from fusion_core._torch.inductor import CustomGraphPass, post_grad_only
from fusion_core.lift.collectives import TARGETS
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.vocabulary.fp4 import dequantize_mxfp4, dequantize_nvfp4
from fusion_core.vocabulary.fp8 import dequantize_fp8
from tests.properties.cases import Case, model, tensors
from tests.support.graphs import describe

PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
REFERENCE = FusionConfig(order=("reference",))


@dataclass
class Outcome:
    """What one rank saw.

    Attributes:
        sites: Of the compiled graph.
        untouched: Whether the graph stayed as it was, node for node, with no backend in use.
        sites_without_backends: What was found then.
        collectives: all_reduces before and after the pass.
        forms: Dtype, shape of each live output, fused and unfused.
        excess: For each live output the largest error of a row, in units of what it may be, see `excess`.
        normed: The dtype of the norm, as the model gives it.
    """

    sites: list[SiteReport] = field(default_factory=list)
    untouched: bool = True
    sites_without_backends: list[SiteReport] = field(default_factory=list)
    collectives: tuple[int, int] = (1, 1)
    forms: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)


def up_to_the_graph(case: Case) -> Outcome:
    """By Dynamo and Inductor's passes, the graph then run eagerly."""
    given = tensors(case)
    function = model(case)
    unfused = function(*_copies(given, case))
    look = Look()
    torch._dynamo.reset()
    with torch.no_grad():
        fused = torch.compile(function, backend=post_grad_only(look), fullgraph=True)(*_copies(given, case))
    (outcome,) = look.outcomes  # one graph
    outcome.forms = _forms(case.live, fused, unfused)
    outcome.excess = _compare(case, given, unfused, fused)
    return outcome


class Look(CustomGraphPass):
    """The pass without backends, and then with the reference, on each graph; what became of it."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        original = describe(graph)
        without = FusionPass(FusionConfig(order=())).run(graph)
        untouched = describe(graph) == original
        report = FusionPass(REFERENCE).run(graph)
        graph.lint()
        collectives = tuple(
            sum(row[0] == "call_function" and row[2] in TARGETS for row in rows) for rows in (original, describe(graph))
        )
        self.outcomes.append(Outcome(list(report.sites), untouched, list(without.sites), collectives))

    def uuid(self) -> None:
        """None: nothing is cached."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Look:
        return self


def through_inductor(case: Case) -> Outcome:
    """By the public door and all of Inductor, code generation included."""
    from torch._inductor.utils import run_and_get_code

    given = tensors(case)
    function = model(case)
    unfused = function(*_copies(given, case))
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True), torch.no_grad():
        compiled = fusion_core.compile(function, REFERENCE, fullgraph=True)
        fused, sources = run_and_get_code(compiled, *_copies(given, case))
    report = fusion_core.last_report()
    calls = sum(source.count("_c10d_functional.all_reduce") for source in sources)
    return Outcome(
        sites=list(report.sites),
        collectives=(1, calls),
        forms=_forms(case.live, fused, unfused),
        excess=_compare(case, given, unfused, fused),
    )


def with_another_eps(case: Case, factor: float) -> dict[str, float]:
    """The excess of a function that is wrong: what the bound must notice."""
    given = tensors(case)
    unfused = model(case)(*_copies(given, case))
    wrong = model(dataclasses.replace(case, eps=case.eps * factor))(*_copies(given, case))
    return _compare(case, given, unfused, wrong)


def eagerly(case: Case, options: dict[str, Any]) -> Outcome:
    """A quantised pattern by its eager function, against its words one after another."""
    pattern = PATTERNS[case.pattern]
    plain, _, kind = case.pattern.partition("rms_norm_")
    given = tensors(case)
    oracle = _oracle(case, given, f"{plain}rms_norm")
    scales = _scales(kind, oracle["normed"])
    arguments = {name: given[name] for name in pattern.tensors if name in given} | scales
    arguments |= {"eps": case.eps, "weight_bias": case.weight_bias, **options}
    results = getattr(fusion_core.ops, case.pattern)(**arguments, outputs=pattern.outputs, config=REFERENCE)
    fused = dict(zip(pattern.outputs, results, strict=True))
    unfused = _words(case, given, kind, {**scales, **options})
    outcome = Outcome(forms=_forms(pattern.outputs, results, tuple(unfused[name] for name in pattern.outputs)))
    for name, exact in oracle.items():
        outcome.excess[name] = excess(fused[name], unfused[name], exact, unfused[name].dtype)
    values = [_dequantized(kind, each, scales, options) for each in (fused, unfused)]
    outcome.excess["quantized"] = excess(*values, oracle["normed"], unfused["normed"].dtype)
    return outcome


def _words(case: Case, given: dict[str, Any], kind: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """The words of a quantised pattern one after another in the input's dtype, behind a real all_reduce."""
    reduced = given["x"].clone(memory_format=torch.contiguous_format)
    dist.all_reduce(reduced)
    values = {"reduced": reduced}
    hidden = reduced
    if case.has_residual:
        hidden = values["residual_out"] = vocabulary.add(reduced, given["residual"])
    values["normed"] = vocabulary.rms_norm(hidden, given["weight"], case.eps, weight_bias=case.weight_bias)
    quantized = getattr(vocabulary, f"quantize_{kind}")(values["normed"], **options)
    values |= (
        {"quantized": quantized} if kind == "static_fp8" else dict(zip(("quantized", "scale"), quantized, strict=True))
    )
    return values


def _scales(kind: str, normed: Tensor) -> dict[str, Tensor]:
    """The scale that a calibration would give: the same on every rank, as its tensors are."""
    largest = normed.abs().amax().item() if normed.numel() else 1.0
    largest = largest or 1.0
    if kind == "static_fp8":
        return {"scale": torch.tensor([largest / 448.0])}
    return {"global_scale": torch.tensor([448.0 * 6.0 / largest])} if kind == "nvfp4" else {}


def _dequantized(kind: str, results: dict[str, Tensor], scales: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    codes = results["quantized"]
    if kind == "nvfp4":
        layout = {"scale_layout": options["scale_layout"]}
        return dequantize_nvfp4(codes, results["scale"], scales["global_scale"], **layout, dtype=torch.float64)
    if kind == "mxfp4":
        return dequantize_mxfp4(codes, results["scale"], dtype=torch.float64)
    scale = scales["scale"] if kind == "static_fp8" else results["scale"]
    return dequantize_fp8(codes, scale, group_size=options.get("group_size"), dtype=torch.float64)


def excess(fused: Tensor, unfused: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """The fused error in units of what it may be, for the worst row; up to 1 it is allowed.

    The error of a row is its largest difference from the float64 oracle. Allowed are 1.5 times the unfused error, and
    one rounding in ``dtype`` of the row's largest value, and four roundings in float32, in which a norm is
    computed: two right spellings of one norm differ by as much. Rows, because a huge row must not hide the others;
    not single elements, because rounding before the weight or after it differs more than that in small elements. A
    row in which the unfused model is not finite allows anything.
    """
    if fused.shape != oracle.shape or unfused.shape != oracle.shape:
        return float("inf")
    if oracle.numel() == 0:
        return 0.0
    rows = oracle.reshape(-1, oracle.shape[-1] if oracle.dim() else 1)
    error, allowed = (
        (result.to(torch.float64).reshape(rows.shape) - rows).abs().amax(-1) for result in (fused, unfused)
    )
    largest = rows.abs().amax(-1)
    rounding = largest * (torch.finfo(dtype).eps / 2) + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = 1.5 * allowed + rounding + largest * (4 * torch.finfo(torch.float32).eps / 2)
    worst = torch.where(allowed.isfinite(), error.nan_to_num(torch.inf) / bound, 0.0)
    return float(worst.max())


def _copies(given: dict[str, Tensor | None], case: Case) -> list[Tensor | None]:
    """The inputs again, strides and all: a model that writes into them must not reach the next run."""
    copies = [given["x"], given["residual"], given["weight"], given["bias"]]
    copies = [
        None if tensor is None else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
        for tensor in copies
    ]
    if case.dynamic:
        for tensor in copies[:2]:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return copies


def _forms(
    names: tuple[str, ...], fused: tuple[Tensor, ...], unfused: tuple[Tensor, ...]
) -> dict[str, tuple[Any, Any]]:
    return {
        name: tuple((str(tensor.dtype), tuple(tensor.shape)) for tensor in pair)
        for name, *pair in zip(names, fused, unfused, strict=True)
    }


def _compare(
    case: Case, given: dict[str, Any], unfused: tuple[Tensor, ...], fused: tuple[Tensor, ...]
) -> dict[str, float]:
    oracle = _oracle(case, given, case.pattern)
    results = zip(case.live, unfused, fused, strict=True)
    return {name: excess(ours, plain, oracle[name], _coarser(plain.dtype, case.dtype)) for name, plain, ours in results}


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Of an output's dtype and the reduced sum's, the one that rounds more.

    A float32 norm of a float16 sum has the sum's rounding in it; the unfused model rounds once more on the way, and in
    a row of few elements that may undo the first by chance.
    """
    return max(a, b, key=lambda dtype: torch.finfo(dtype).eps)


def _oracle(case: Case, given: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The pattern's definition on the same group, called with float64."""
    pattern = PATTERNS[name]
    wide = {key: given[key].double() if given[key] is not None else None for key in pattern.tensors}
    scalars = {"eps": case.eps, "weight_bias": case.weight_bias} if case.has_norm else {}
    results = pattern.function(**wide, **scalars, group=dist.group.WORLD.group_name)
    return dict(zip(pattern.outputs, results if isinstance(results, tuple) else (results,), strict=True))
