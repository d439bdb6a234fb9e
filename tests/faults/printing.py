"""Plugins and user code that print, in Python and past it, while a command writes JSON."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer.testing

from tests.faults.command_line import COMMAND, LIMIT
from tests.faults.fault import Fault

FIXTURES = ("tmp_path", "monkeypatch", "capfd")

PLUGIN = """
import os
import sys
import torch
from fusion_core import Reason, Status, Strategy, hookimpl
from tests.acme import opaque
{at_import}

def impl(x, residual, weight, eps, *, group):
    {in_impl}
    return opaque(x, residual, weight, eps, group)

class Rule:
    def __str__(self):
        {in_text}
        return "a rule"
    def __repr__(self):
        return "Rule()"
    def unmet(self, site):
        {in_rule}

@hookimpl
def fusion_strategies():
    {in_strategies}
    return [Strategy("all_reduce_add_rms_norm", "noisy.add", impl, (Rule(),), outputs=("normed", "residual_out"))]

@hookimpl
def fusion_available(device):
    {in_available}
    return []

@hookimpl
def fusion_status(device):
    {in_status}
    return []
"""
MODEL = """
import torch
{at_import}

def build():
    {in_build}
    return model, (torch.ones(4, 64), torch.ones(4, 64), torch.ones(64))

def model(x, residual, weight):
    {in_model}
    total = residual + torch.distributed._functional_collectives.all_reduce(x, "sum", torch.distributed.group.WORLD)
    return torch.nn.functional.rms_norm(total, (64,), weight, 1e-6), total
"""
NOISE = "all the noise"
"""The text that each of them prints."""


def observe(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    where: str,
    args: Sequence[str],
    by: str = f"print('{NOISE}')",
    ranks: int = 0,
    process: bool = False,
) -> str:
    """Run a command with ``--json``, with a plugin and a model of which one prints at one place."""
    for name, text in (("noisy_plugin.py", PLUGIN), ("noisy_model.py", MODEL)):
        (tmp_path / name).write_text(_with(text, where, by))
    about = tmp_path / "noisy-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fusion_core.backends]\nnoisy = noisy_plugin\n")
    monkeypatch.chdir(tmp_path)
    words = [*args, "--json"]
    if ranks or process:
        stdout, stderr = _process(words, tmp_path, ranks)
    else:
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        for name in ("noisy_plugin", "noisy_model"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        from fusion_core.cli.app import app

        done = typer.testing.CliRunner().invoke(app, words, catch_exceptions=False)
        past = capfd.readouterr()
        stdout, stderr = done.stdout + past.out, done.stderr + past.err
    if NOISE not in stderr:
        return f"silence: nothing was printed at {where}: {stdout} {stderr}"
    try:
        json.loads(stdout)
    except ValueError:
        return f"spoilt: {stdout}"
    return "right"


def _with(text: str, where: str, by: str) -> str:
    """The source with this statement at one place, and none at the others."""
    names = [part.split("}")[0] for part in text.split("{")[1:]]
    return text.format(**{name: by if name == where else "" if name == "at_import" else "pass" for name in names})


def _process(words: Sequence[str], folder: Path, ranks: int) -> tuple[str, str]:
    launcher = (
        f"{sys.executable} -m torch.distributed.run --nproc-per-node {ranks} -m fusion_core" if ranks else COMMAND
    )
    path = os.pathsep.join((str(folder), *filter(None, sys.path)))
    done = subprocess.run(
        [*launcher.split(), *words],
        env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return done.stdout, done.stderr


def _row(name: str, fault: str, where: str, *args: str, slow: bool = False, **given: object) -> Fault:
    return Fault("printing", name, fault, "right", {"where": where, "args": args, **given}, slow)


EXPLAIN = ("explain", "noisy_model.py:build")
VERIFY = ("verify", "noisy", "--examples", "1", "--check")
PAST = f"os.write(1, b'{NOISE}\\n')"
CHILD = f"__import__('os').system('echo {NOISE}')"
AT_EXIT = f"__import__('atexit').register(print, '{NOISE}')"

ROWS = (
    *(
        _row(f"{args[0]}: {where}", f"a plugin prints, {where.replace('_', ' ')}", where, *args)
        for args, places in (
            (("backends",), ("at_import", "in_strategies", "in_available", "in_status")),
            (("patterns",), ("at_import", "in_strategies")),
            (("patterns", "--support"), ("in_text",)),
            (EXPLAIN, ("in_available", "in_rule", "in_impl", "in_build", "in_model")),
        )
        for where in places
    ),
    _row("backends: past Python", "a library of a plugin writes to stdout itself", "at_import", "backends", by=PAST),
    _row("backends: a child", "a plugin starts a process that prints", "in_available", "backends", by=CHILD),
    _row("explain: past Python", "a library of the model writes to stdout itself", "in_build", *EXPLAIN, by=f"import os; {PAST}"),
    _row("verify: in_rule", "a requirement prints", "in_rule", *VERIFY, "accepts_its_own_example"),
    _row("verify: in_impl", "a kernel prints in the ranks that check it", "in_impl", *VERIFY, "equals_the_oracle_where_it_accepts", slow=True),
    _row("at exit", "a plugin prints when the interpreter ends", "at_import", "patterns", by=AT_EXIT, process=True, slow=True),
    _row("bench: in_model", "the model prints on each rank", "in_model", "bench", "noisy_model.py:build", "--rounds", "1", "--seconds", "0.01", ranks=2, slow=True),
    _row("tune: in_strategies", "a plugin prints on each rank", "in_strategies", "tune", "--hidden", "64", "--tokens", "1", "--patterns", "all_reduce", "--output", "t.json", ranks=2, slow=True),
    _row("demo: at_import", "a plugin prints in each worker", "at_import", "demo", "--layers", "1", slow=True),
)  # fmt: skip
