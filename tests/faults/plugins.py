"""Broken plugins, each with only the reference backend: when it loads, in a compilation, and when it runs."""

from __future__ import annotations

import importlib
import itertools
import sys
import textwrap
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fusion_core
from fusion_core import FusionConfig, Registry
from fusion_core.plugins.support_table import support_table
from tests.faults import plugin_jobs
from tests.faults.plugin_rows import COMPILING, DIALECTS, FIELDS, HOOKS, IMPORT, NAMES, RUNNING, WRAPPERS
from tests.support.graphs import REFERENCE, fuse
from tests.test_matching import norm, reduce, tensors

ROWS = (*IMPORT, *HOOKS, *WRAPPERS, *FIELDS, *NAMES, *DIALECTS, *COMPILING, *RUNNING)
FIXTURES = ("tmp_path", "monkeypatch", "one_rank", "request")

PRELUDE = """
import sys
import torch
from fusion_core import Reason, Strategy, Tokens, hookimpl
from tests.acme import opaque
from tests.test_matching import ADD
OUTPUTS = ("normed", "residual_out")
"""
"""The start of each plugin's source; `opaque` is a correct kernel."""


def observe(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_rank: str,
    request: pytest.FixtureRequest,
    then: str = "load",
    called: str = "broken",
) -> str:
    """Load a plugin with this source, then compile or call it as ``then`` requests."""
    (tmp_path / "broken_plugin.py").write_text(PRELUDE + textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    sys.modules.pop("broken_plugin", None)
    if then == "ranks":
        verdicts = request.getfixturevalue("two_ranks").run(plugin_jobs.on_a_rank, str(tmp_path))
        return verdicts[0] if verdicts[0] == verdicts[1] else f"ranks differ: {verdicts}"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        registry = Registry.of(
            [REFERENCE, EntryPoint(called, plugin_jobs.POINT.value, plugin_jobs.POINT.group)], FusionConfig()
        )
        assert registry.backends["reference"].strategies
        failures = [str(failure.reason) for failure in registry.failures]
        if failures:
            assert len(warned) == len(failures), [str(each.message) for each in warned]
            return f"refused: {'; '.join(failures)}"
        verdict = {
            "load": lambda registry: "right",
            "compile": compiled,
            "dynamic": dynamic,
            "whole": plugin_jobs.whole,
            "key": lambda registry: plugin_jobs.whole(registry, caches=True),
            "again": lambda registry: plugin_jobs.whole(registry, 3),
            "eager": eager,
            "support": lambda registry: f"right: {support_table(registry)}",
            "report": reported,
            "status": status,
        }[then](registry)
    said = "; ".join(str(each.message) for each in warned if "fusion_core" in str(each.message))
    return f"{verdict.replace('right', 'right:')}; said: {said}" if said else verdict


def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return norm(total, w), total


def dynamic(registry: Registry) -> str:
    """The same in a graph for any number of tokens."""
    return compiled(registry, True)


def compiled(registry: Registry, dynamic: bool = False) -> str:
    """The outcome for the plugin's strategies in a compilation, after a check of the numbers."""
    given = tensors()
    try:
        with torch._dynamo.config.patch(specialize_float=True):
            fused = fuse(model, *given, using=registry, dynamic=dynamic)
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a kernel's error is passed on with a note
        return f"error: {type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
    for found, wanted in zip(fused.results, model(*given), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    if fused.site.strategy and fused.site.strategy.startswith("broken."):
        return "right"
    own = [decision for decision in fused.site.decisions if (decision.strategy or "").startswith("broken.")]
    reasons = [str(reason) for decision in own for reason in decision.reasons]
    return f"unfused: {'; '.join(reasons) or 'nothing is said'}"


def eager(registry: Registry) -> str:
    """The verdict of an eager function of `fusion_core.ops`."""
    x, r, w = tensors()
    config = FusionConfig(reports=next(_NUMBERS))
    with mock.patch("fusion_core.ops._registry_for", return_value=registry), torch.no_grad():
        try:
            found = fusion_core.ops.all_reduce_add_rms_norm(x, r, w, 1e-6, config=config)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a kernel's error is passed on with a note
            return f"error: {type(error).__name__}: {error} {' '.join(getattr(error, '__notes__', []))}"
    for each, wanted in zip(found, model(x, r, w), strict=True):
        torch.testing.assert_close(each, wanted, rtol=0.02, atol=0.02)
    return "right"


def reported(registry: Registry) -> str:
    registry.notify(fusion_core.Report(sites=()))
    return "right"


def status(registry: Registry) -> str:
    try:
        registry.status("broken", fusion_core.Device("cpu"))
    except fusion_core.BackendError as error:
        return f"error: BackendError: {error}"
    return "right"


_NUMBERS = itertools.count(100)
"""Numbers for a different configuration in each eager call, since decisions are cached per configuration."""
