"""What a report must get right: the cause at each all_reduce, and the outcome."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

import fusion_core
from fusion_core import Decision, FusionConfig, Reason, Report, SiteReport, Stage, fallback
from fusion_core.report import history
from tests.acme import KERNEL, acme
from tests.faults.fault import Fault
from tests.support.graphs import REFERENCE, fuse, registry
from tests.test_matching import add_then, norm, tensors
from tests.test_near_misses import MISSES, broken, said

FIXTURES = ("tmp_path", "monkeypatch")


def observe(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> str:
    """One fact of a report, in a process group of one."""
    monkeypatch.setattr(fallback, "_fallen_back", {})
    with _one_rank():
        return _FACTS[what](tmp_path, monkeypatch, **given)


@contextmanager
def _one_rank() -> Iterator[None]:
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _misses(tmp_path: Path, monkeypatch: Any, model: str) -> str:
    function, _ = MISSES[model]
    fused = fuse(function, *tensors())
    for got, plain in zip(tree_leaves(fused.results), tree_leaves(function(*tensors())), strict=True):
        torch.testing.assert_close(got.float(), plain.float(), rtol=0.05, atol=0.05)
    return "right: " + (" | ".join("; ".join(said(site)) for site in fused.sites) or "no near miss")


def _break(tmp_path: Path, monkeypatch: Any, dry: bool) -> str:
    torch._dynamo.reset()
    if dry:
        with torch.no_grad():
            report = fusion_core.explain(broken, *tensors())
        sites = [site.label for site in report.sites]
    else:
        before = len(fusion_core.reports())
        with torch.no_grad():
            torch.compile(broken, backend="fusion_core")(*tensors())
        report = fusion_core.reports()[before]
        sites = [site.label for site in report.sites]
    (refused,) = [line for line in str(report).splitlines() if "graph break" in line]
    return f"right: {', '.join(sites)}: {refused.strip()}"


def _headline(
    tmp_path: Path, monkeypatch: Any, points: str = "reference", fell_back: bool = False, **config: Any
) -> str:
    found = [acme(monkeypatch, KERNEL), REFERENCE] if points == "kernel" else [REFERENCE]
    using = registry(*found, config=FusionConfig(**config))
    report = fuse(add_then(norm), *tensors(), using=using).reports[0]
    if fell_back:
        group = report.sites[0].attributes["group"]
        fusion_core.fell_back(
            str(report.sites[0].strategy), group, Reason("ranks", "rank 1 runs another graph", "the same one")
        )
        _, unfused = str(report).split("at run time:\n")
        return f"unfused: {str(report).splitlines()[0]} / {unfused.splitlines()[0].strip()}"
    return f"right: {str(report).splitlines()[0]}"


def _merged(tmp_path: Path, monkeypatch: Any, merge: bool) -> str:
    from tests.merging.forms import given, residual_last

    using = registry(REFERENCE, config=FusionConfig(merge=merge))
    return f"right: {str(fuse(residual_last, *given(), using=using).reports[0]).splitlines()[0]}"


def _kept(tmp_path: Path, monkeypatch: Any, schema: int | None = None) -> str:
    report = fuse(add_then(norm), *tensors(), using=registry(REFERENCE)).reports[0]
    data = report.to_dict() | ({} if schema is None else {"schema": schema})
    try:
        again = replace(Report.from_dict(data), origin="cache", compiled_at="2026-01-01")
    except ValueError as error:
        return f"refused: {error}"
    assert again.sites == report.sites or [s.decisions for s in again.sites] == [s.decisions for s in report.sites]
    return f"right: {str(again).splitlines()[0]}"


def _hostile(tmp_path: Path, monkeypatch: Any) -> str:
    name = "<script>alert('1')</script>"
    decision = Decision("all_reduce", f"a.{name}", Stage.REQUIRES, (Reason("c", name),))
    site = SiteReport("all_reduce", f"a.{name}", name, {"group": "0"}, (decision,))
    fusion_core.fell_back(f"a.{name}", "0", Reason("c", name))
    Report(sites=(replace(site, attributes={}, graph=1),), failures=(name,), device=name).to_html(tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    return f"right: {len(re.findall('<script', page))} of {page.count('&lt;script')} names are markup"


def _bounded(tmp_path: Path, monkeypatch: Any, keep: int, graphs: int) -> str:
    monkeypatch.setattr(history, "_reports", [])
    for number in range(graphs):
        history.record(Report(sites=(), device=str(number)), keep)
    return f"right: {', '.join(report.device for report in fusion_core.reports())}"


def _setting(tmp_path: Path, monkeypatch: Any, text: str) -> str:
    monkeypatch.setenv("FUSION_CORE_REPORTS", text)
    try:
        return f"right: {FusionConfig().reports}"
    except fusion_core.ConfigError as error:
        return f"error: {error}"


_FACTS: dict[str, Callable[..., str]] = {
    "misses": _misses,
    "break": _break,
    "headline": _headline,
    "merged": _merged,
    "kept": _kept,
    "hostile": _hostile,
    "bounded": _bounded,
    "setting": _setting,
}


def _row(name: str, fault: str, expected: str, *, slow: bool = False, **given: Any) -> Fault:
    return Fault("reports", name, fault, expected, given, slow)


def _miss(model: str, fault: str, expected: str, *, slow: bool = True) -> Fault:
    return _row(f"near miss: {model}", fault, f"right: {expected}", slow=slow, what="misses", model=model)


ROWS = (
    _miss("a LayerNorm later", "a LayerNorm stands two projections on", ".*followed by mm, needs add, layer_norm or rms_norm of it"),
    _miss("a LayerNorm of the residual stream", "the next sum is normed by LayerNorm", "no near miss"),
    _miss("a LayerNorm here", "the sum itself is normed by LayerNorm", "no near miss"),
    _miss("nearly a LayerNorm", "a LayerNorm's epsilon is outside the root", ".*layer_norm: .*outside the root.*"),
    _miss("a slice of its own result", "a matched place's result is cut", "no near miss"),
    _miss("a slice beside a clamp", "a clamp, and the last token cut out", ".*add is followed by clamp, needs.*"),
    _miss("a slice of its own norm", "the last token of a norm, and FP8 codes elsewhere", "no near miss"),
    _miss("a clamp", "the sum is clamped", ".*add is followed by clamp, needs rms_norm of it", slow=False),
    _miss("nan_to_num", "nan_to_num of the sum", ".*add is followed by nan_to_num, needs.*"),
    _miss("two norms of one sum", "an RMSNorm and a LayerNorm of one sum", "no near miss"),
    _miss("half a residual", "the residual is scaled", ".*scaled by 0.5.*"),
    _miss("several layers", "three layers, a cause each", ".*scaled by 0.5.* \\| .*followed by clamp.* \\| "),
    _miss("the end of the model", "the model returns the sum", ".*the graph ends here, after add, as does the model's.*"),
    _row("graph break", "a graph break behind the add", "right: all_reduce: .*the graph ends here \\(graph break\\), after add.*", slow=True, what="break", dry=False),
    _row("two graphs in one dry run", "a graph break, explained", "right: graph 1: all_reduce, graph 2: all_reduce: .*\\(at graph 1: all_reduce\\)", slow=True, what="break", dry=True),
    _row("definitions only", "no kernel is installed", "right: .* 0 of 1 all_reduces on a kernel, 1 as before \\(reference\\), on 1 x cpu", what="headline"),
    _row("a kernel", "a plugin's kernel runs", "right: .* 1 of 1 all_reduces on a kernel, on 1 x cpu", what="headline", points="kernel"),
    _row("no backend", "order is empty", "right: .* 0 of 1 all_reduces on a kernel, 1 refused, on 1 x cpu", what="headline", order=()),
    _row("a limit of none", "limit is 0", "right: .* 0 of 1 all_reduces on a kernel, 1 refused, on 1 x cpu", what="headline", limit=0),
    _row("a kernel that fell back", "ranks run different graphs", "unfused: .* 0 of 1 all_reduces on a kernel, 1 unfused at run time, .* / acme.add runs unfused: rank 1 runs another graph.*", what="headline", points="kernel", fell_back=True),
    _row("merge on", "two all_reduces made one", "right: .* 0 of 1 all_reduces on a kernel, 1 merged \\(of 2\\), on 1 x cpu", slow=True, what="merged", merge=True),
    _row("merge off", "two all_reduces stay two", "right: .* 0 of 2 all_reduces on a kernel, 2 as before \\(reference\\), on 1 x cpu", slow=True, what="merged", merge=False),
    _row("a kept report", "the graph comes from the cache", "right: fusion_core: from the compile cache, .*1 as before \\(reference\\), on 1 x cpu", what="kept"),
    _row("a kept report of another form", "an older version wrote it", "refused: the report has schema 1, needs 3", what="kept", schema=1),
    _row("hostile names", "markup in every name", "right: 0 of [1-9]\\d* names are markup", what="hostile"),
    _row("many graphs", "more graphs than are kept", "right: 3, 4", what="bounded", keep=2, graphs=5),
    _row("a setting of none", "FUSION_CORE_REPORTS=0", "error: FUSION_CORE_REPORTS is '0', needs a whole number, 1 or more", what="setting", text="0"),
    _row("a setting that is no number", "FUSION_CORE_REPORTS=all", "error: FUSION_CORE_REPORTS is 'all', needs .*", what="setting", text="all"),
)  # fmt: skip
