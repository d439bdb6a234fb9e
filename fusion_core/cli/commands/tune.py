"""``fusion-core tune``: measures every strategy on this machine and writes the table by which strategies are chosen."""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusion_core.cli.launch import launch
from fusion_core.cli.options import Json, Options, Order, Strict, make_config
from fusion_core.cli.output import stdout_to_stderr
from fusion_core.cli.process_group import check_same, choices, command, process_group
from fusion_core.cli.tuned import check_can_keep, finish
from fusion_core.errors import ConfigError
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.tables.schema import LARGEST

if TYPE_CHECKING:
    from fusion_core.tune.tuner import Tuned

LAUNCH = "torchrun --nproc-per-node 2 -m fusion_core tune"
PATIENCE = 300.0
"""Seconds over the budget after which the process exits. One point and its compilation may take long; a hang ends."""


class DType(StrEnum):
    """Dtypes of x."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def tune(
    patterns: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Only these, or 'all'. Default: the most frequent in models, and those with a strategy on this "
            "machine.",
            show_default=False,
        ),
    ] = None,
    hidden: Annotated[str, typer.Option(metavar="N,M", help="Hidden sizes.")] = "2048,4096,8192",
    tokens: Annotated[
        str, typer.Option(metavar="N,M", help="Token counts; A..B for A, twice as many, and so on up to B.")
    ] = "1..16384",
    dtype: Annotated[DType, typer.Option(help="Dtype of the reduced tensor.")] = DType.bfloat16,
    budget: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Start no further size after this time.")
    ] = 600.0,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Write the table there instead of to your cache directory, where fusion_core finds it.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Also write all times as a plot.", show_default=False)
    ] = None,
    collective: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="Also measure the unfused path over this serving engine's own all_reduce, such as vllm's. Strategies "
            "are compared with it in that engine's models.",
            show_default=False,
        ),
    ] = None,
    order: Order = None,
    strict: Strict = False,
    options: Options = None,
    as_json: Json = False,
) -> None:
    """Measure every usable strategy of every pattern against the unfused path, on this machine and number of GPUs.

    Start it with torchrun, with as many processes as your models use: torchrun --nproc-per-node 2 -m fusion_core tune.
    Writes the table by which fusion_core chooses from then on, and prints the fastest path for each range of token
    counts. Exit status 1 if nothing could be measured.
    """
    config = make_config(order, strict, options)
    sizes, counts = numbers("hidden", hidden), numbers("tokens", tokens)
    launched = launch()
    if launched is None or launched.rank == 0:
        check_can_keep(output, plot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # `backends` names the backends that fail to load
        registry = Registry.load(config)
    asked = _named(registry, patterns)
    if collective is not None:
        from fusion_core.tune import engines

        engines.check(collective)
    ours = not dist.is_initialized()
    if ours and (launched is None or launched.world_size < 2):
        raise ConfigError(f"this is one process, in which there is nothing to reduce, needs 2 or more; {LAUNCH}")
    if ours and launched and torch.cuda.is_available():
        local, gpus = launched.local_world_size, torch.cuda.device_count()
        if local > gpus:
            raise ConfigError(f"there are {local} processes for {gpus} GPUs, needs a GPU for each")
    faulthandler.dump_traceback_later(budget + PATIENCE, exit=True, file=2)
    try:
        with process_group() as rank:
            began = time.monotonic()
            asks = {"patterns": patterns, "hidden": hidden, "tokens": tokens, "dtype": dtype.value}
            check_same(**choices(config, registry), **asks, collective=collective)
            with stdout_to_stderr():
                tuned = _measure(registry, asked, sizes, counts, dtype.value, budget, rank, collective)
            if rank == 0:
                finish(tuned, output, plot, as_json, time.monotonic() - began)
            if ours and torch.cuda.is_available():
                _leave(0 if tuned.table is not None else 1)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if tuned.table is None:
        raise typer.Exit(1)


def numbers(option: str, text: str) -> tuple[int, ...]:
    """``"1,2,8..32"`` as 1, 2, 8, 16, 32, in rising order.

    Raises:
        ConfigError: for any other text, and for numbers above the limit of a table.
    """
    found: set[int] = set()
    for part in text.split(","):
        matched = re.fullmatch(r"(\d{1,10})(?:\.\.(\d{1,10}))?", part.strip())
        first, last = (int(matched[1]), int(matched[2] or matched[1])) if matched else (0, 0)
        if not 1 <= first <= last <= LARGEST:
            needs = f"whole numbers from 1 to {LARGEST} separated by commas, or A..B for A, twice as many, up to B"
            raise ConfigError(f"--{option} is {text!r}, needs {needs}")
        while first <= last:
            found.add(first)
            first *= 2
    return tuple(sorted(found))


def _named(registry: Registry, text: str | None) -> list[Pattern] | None:
    """The patterns that the user named; None if they named none."""
    if text is None:
        return None
    if text == "all":
        return list(registry.patterns.values())
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in registry.patterns]:
        known = ", ".join(registry.patterns)
        raise ConfigError(f"--patterns names {', '.join(map(repr, unknown))}, needs 'all' or names among {known}")
    return [registry.patterns[name] for name in dict.fromkeys(names)]


def _measure(
    registry: Registry,
    asked: Sequence[Pattern] | None,
    hidden: Sequence[int],
    tokens: Sequence[int],
    dtype: str,
    budget: float,
    rank: int,
    collective: str | None,
) -> Tuned:
    from fusion_core.tune.engines import all_reduce_of
    from fusion_core.tune.plan import Plan
    from fusion_core.tune.ranks import Ranks
    from fusion_core.tune.timers import timer_for  # imported late: these modules import the compiler
    from fusion_core.tune.tuner import tune as run

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    ranks = Ranks()
    with all_reduce_of(collective, ranks) as collectives:
        plan = Plan(registry, getattr(torch, dtype), device, ranks.name, ranks.size, collectives)
        chosen = plan.patterns(hidden, min(tokens)) if asked is None else plan.sorted(asked)
        # ranks must measure the same patterns even if one of them lacks a backend
        common = set.intersection(*map(set, ranks.gather([pattern.name for pattern in chosen])))
        chosen = [pattern for pattern in chosen if pattern.name in common]
        timer = timer_for(ranks, device)
        with _Progress(len(chosen) * len(hidden) * len(tokens), rank == 0) as progress:
            return run(plan, ranks, timer, chosen, hidden, tokens, budget, command(), progress.update)


def _leave(status: int) -> None:
    """Exit without destroying the process group, which can wait forever for CUDA graphs."""
    from fusion_core.tune.ranks import Ranks

    Ranks().barrier()  # if a rank exited with a failure before this, torchrun would kill rank 0 while it prints
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Progress:
    """Progress that rank 0 prints on stderr: a bar in a terminal, else a line for each pattern and hidden size."""

    def __init__(self, points: int, shown: bool) -> None:
        console = Console(stderr=True)
        self._lines = shown and not console.is_terminal
        self._last = ""
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console, disable=not shown or self._lines)
        self._task = self._bar.add_task("", total=points)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, done: int, what: str) -> None:
        """Show that ``done`` points are done and that ``what`` is next."""
        self._bar.update(self._task, completed=done, description=what)
        block = what.rpartition(", tokens ")[0] or what
        if self._lines and block != self._last:
            typer.echo(f"fusion-core: {done} points: {block}", err=True)
        self._last = block
