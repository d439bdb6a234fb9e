"""``fusion-core bench``: the speed-up of a user's model by fusion_core at each batch size."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import time
import warnings
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer

from fusion_core.bench.result import Outcome
from fusion_core.bench.shapes import SHAPES
from fusion_core.bench.subject import BATCHES, CONTEXT, LAYERS, parse_batches, subject
from fusion_core.cli import bench_text as text
from fusion_core.cli import machine, plotting
from fusion_core.cli.launch import launch
from fusion_core.cli.options import Json, Options, Order, Strict, make_config
from fusion_core.cli.output import Stages, check_can_write, print_json, show, table
from fusion_core.cli.process_group import check_same, choices, command, process_group
from fusion_core.cli.user_code import failed
from fusion_core.errors import ConfigError, FusionError
from fusion_core.plugins.registry import Registry


class Mode(StrEnum):
    """Modes of torch.compile."""

    default = "default"
    reduce_overhead = "reduce-overhead"
    max_autotune = "max-autotune"
    max_autotune_no_cudagraphs = "max-autotune-no-cudagraphs"


def bench(
    function: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:FUNCTION",
            help="Returns (model, args) or (model, args, kwargs); if it has a parameter batch, it is called for every "
            "batch size. Also file.py:FUNCTION.",
            show_default=False,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="Instead of a function: a decoder stack with this model's layer sizes.", show_default=False),
    ] = None,
    list_shapes: Annotated[bool, typer.Option("--list-shapes", help="Print the shapes and exit.")] = False,
    layers: Annotated[
        int | None, typer.Option(min=1, help=f"Layers of the shape's stack. Default: {LAYERS}.", show_default=False)
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help=f"Tokens in the shape's KV cache. Default: {CONTEXT}.", show_default=False),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(metavar="A,B", help=f"Batch sizes. Default: {','.join(map(str, BATCHES))}.", show_default=False),
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Mode of torch.compile. Default: reduce-overhead on a GPU, default on a CPU.", show_default=False
        ),
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="One dynamic graph for all batch sizes.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each side; the sides alternate.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.001, help="Seconds of calls in one round of one side.")] = 0.2,
    most_difference: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Largest allowed difference between the results, over their largest magnitude. Default: by dtype.",
            show_default=False,
        ),
    ] = None,
    fail_below: Annotated[
        float | None, typer.Option(metavar="GAIN", help="Exit with status 1 if a gain is lower.", show_default=False)
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Skip batch sizes that would exceed this time.", show_default=False),
    ] = None,
    watchdog: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="If one stage takes longer, print the stacks of all threads and exit.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Also write the gains as a plot.", show_default=False)
    ] = None,
    order: Order = None,
    strict: Strict = False,
    options: Options = None,
    as_json: Json = False,
) -> None:
    """Measure how much faster fusion_core makes a model: compile it with and without, and time both side by side.

    Start it with torchrun: torchrun --nproc-per-node 2 -m fusion_core bench app.py:step. Exit status 1 if the results
    differ by more than rounding explains, or if a gain is below --fail-below.
    """
    began = time.monotonic()
    if list_shapes:
        _list_shapes(as_json)
        return
    config = make_config(order, strict, options)
    sizes = parse_batches(batches)
    launched = launch()
    if plot is not None:
        plotting.check_can_save(plot)
        check_can_write("--plot", plot)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # reports name the backends that fail to load
        registry = Registry.load(config)  # an order or option that cannot be used is an error before the model is built
    with _Progress(watchdog) as progress:
        measured = subject(function, shape, layers, context, sizes)
        if not dist.is_initialized() and launched is None:
            raise ConfigError(
                "this is one process, in which there is nothing to reduce, needs 2 or more; "
                "torchrun --nproc-per-node 2 -m fusion_core bench ..."
            )
        from fusion_core.bench.run import Plan, run  # imported late: it imports the compiler

        mode_name = None if mode is None else mode.value
        plan = Plan(config, mode_name, dynamic, rounds, seconds, most_difference, budget, began)
        with process_group() as rank:
            ranks = dist.get_world_size()
            check_same(**choices(config, registry), batches=batches, dynamic=dynamic)
            try:
                outcome = run(plan, measured.batches, measured.call, progress.stage if rank == 0 else progress.unseen)
            except FusionError:
                raise
            except (Exception, SystemExit) as error:
                raise failed(error) from error
    problems = outcome.problems(fail_below)
    if rank == 0:
        if plot is not None:
            plotting.save(plot, f"{measured}, {ranks} ranks", [text.panel(outcome, f"mode {outcome.mode}")])
        if as_json:
            about = {"command": command(), "machine": machine.machine(), "ranks": ranks, "subject": measured.to_dict()}
            settings = {"dynamic": dynamic, "rounds": rounds, "round_s": seconds, "config": config.to_dict()}
            print_json({**about, **settings, "problems": list(problems), **outcome.to_dict()})
        else:
            graphs = "one dynamic graph" if dynamic else "a graph for each batch size"
            typer.echo(f"{measured}; {ranks} ranks, {machine.machine()['device']}; mode {outcome.mode}, {graphs}\n")
            _show(outcome, dynamic, budget)
        for problem in problems:
            typer.echo(f"fusion-core: {problem}", err=True)
    if problems:
        raise typer.Exit(1)


def _list_shapes(as_json: bool) -> None:
    if as_json:
        print_json({name: shape.to_dict() for name, shape in SHAPES.items()})
        return
    columns = ("hidden", "MLP", "heads", "key-value heads", "head size")
    rows = table("shape", *columns, "sizes of", right=columns)
    for name, shape in SHAPES.items():
        sizes = (shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim)
        rows.add_row(name, *map(str, sizes), shape.source)
    show(rows)


def _show(outcome: Outcome, dynamic: bool, budget: float | None) -> None:
    ascii_only = not (sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf"))
    if outcome.rows:
        show(text.grid(outcome))
        typer.echo(f"\n{text.drawing(outcome, ascii_only)}\n")
    for note in text.notes(outcome, dynamic, budget):
        typer.echo(note)


class _Progress:
    """Progress that rank 0 prints on stderr, and a watchdog over every stage and the time after the last one."""

    def __init__(self, watchdog: float | None) -> None:
        self._watchdog = watchdog
        self._stages = Stages()

    def __enter__(self) -> _Progress:
        self._watch()
        self._stages.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stages.__exit__(*error)
        if self._watchdog is not None:
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def stage(self, words: str) -> Iterator[None]:
        """One stage, shown."""
        with self.unseen(words), self._stages.stage(words, words):
            yield

    @contextlib.contextmanager
    def unseen(self, words: str) -> Iterator[None]:
        """One stage, on a rank that shows nothing."""
        yield
        self._watch()

    def _watch(self) -> None:
        if self._watchdog is not None:  # each call restarts the timer
            faulthandler.dump_traceback_later(self._watchdog, exit=True, file=2)
