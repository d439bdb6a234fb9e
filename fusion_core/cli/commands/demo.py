"""``fusion-core demo``: the whole pipeline on a laptop, with a tensor-parallel Hugging Face Llama on the CPU."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from enum import StrEnum
from typing import Annotated

import typer

from fusion_core.cli import demo_job
from fusion_core.cli.demo_result import Result, Setup
from fusion_core.cli.options import Json, make_config
from fusion_core.cli.output import Stages, print_json, show, table
from fusion_core.errors import ConfigError
from fusion_core.plugins.registry import Registry
from fusion_core.workers import WorkerError, WorkerPool

WORLD_SIZES = (2, 4, 8)
"""World sizes that divide the model's heads."""
TIMEOUT = 600.0
"""Seconds that one stage may take: the first compilation is slow on a busy machine."""


class DType(StrEnum):
    """Dtypes that the demo can run in."""

    bfloat16 = "bfloat16"
    float32 = "float32"


def demo(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 4,
    world_size: Annotated[int, typer.Option(help="Processes: 2, 4 or 8.")] = 2,
    dtype: Annotated[DType, typer.Option(help="Dtype of the model.")] = DType.bfloat16,
    as_json: Json = False,
) -> None:
    """Fuse a small Llama in several processes on this machine's CPU, and check it against the unfused one and float64.

    Exit status 1 if an all_reduce is not fused, if the fused model is farther from float64 than the unfused one, or if
    the collectives differ from those of the unfused model.
    """
    if missing := [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"{' and '.join(missing)} {verb} not installed, needs the demo extra; pip install 'fusion-core[demo]'"
        )
    if world_size not in WORLD_SIZES:
        raise ConfigError(f"--world-size is {world_size}, needs 2, 4 or 8")
    config = make_config()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the report names the backends that fail to load
        Registry.load(config)  # an order that cannot be used is an error before anything starts
    with Stages() as stages:
        try:
            result = measure(layers, world_size, dtype.value, stages)
        except WorkerError as error:
            typer.echo(f"fusion-core: {error}", err=True)
            raise typer.Exit(1) from error
    if as_json:
        print_json({**result.to_dict(), "seconds": stages.seconds})
    else:
        _show(result)
    if result.problems:
        raise typer.Exit(1)


def measure(layers: int, world_size: int, dtype: str, stages: Stages) -> Result:
    """Run the model unfused, fused and in float64."""
    with (
        tempfile.TemporaryDirectory(prefix="fusion-core-demo-") as path,
        WorkerPool(world_size, timeout=TIMEOUT) as pool,
    ):
        with stages.stage("build", f"starting {world_size} processes and building a Llama of {layers} layers"):
            parameters = pool.run(demo_job.build, path, layers, dtype)[0]
        with stages.stage("load", "loading it in shards"):
            pool.run(demo_job.load, path, dtype)
        with stages.stage("unfused", "compiling and running it without fusion"):
            unfused = pool.run(demo_job.compiled, "inductor")[0]
        with stages.stage("fused", "compiling and running it with fusion"):
            fused = pool.run(demo_job.compiled, "fusion_core")[0]
        with stages.stage("float64", "running it in float64"):
            exact = pool.run(demo_job.exact, path)[0]
    assert exact is not None
    return Result.of(Setup(layers, world_size, dtype, parameters), unfused, fused, exact)


def _show(result: Result) -> None:
    setup, unfused, fused = result.setup, result.unfused, result.fused
    size = f"{setup.parameters / 1e6:.1f} million parameters in {setup.dtype}"
    typer.echo(f"a Llama of {setup.layers} layers, {size}, in {setup.world_size} processes on the CPU\n")
    for report in result.reports:
        typer.echo(f"{report}\n")
    rows = table("", "unfused", "fused", right=("unfused", "fused"))
    for name in sorted({*unfused.collectives, *fused.collectives}):
        rows.add_row(
            f"{name} that reached the process group",
            str(unfused.collectives.get(name, 0)),
            str(fused.collectives.get(name, 0)),
        )
    rows.add_row(
        "largest distance of a logit from float64", f"{unfused.largest_error:.3g}", f"{fused.largest_error:.3g}"
    )
    rows.add_row(
        "distance of all logits from float64, relative l2",
        f"{unfused.relative_error:.3g}",
        f"{fused.relative_error:.3g}",
    )
    rows.add_row("first call, with compilation", f"{unfused.compile_seconds:.1f} s", f"{fused.compile_seconds:.1f} s")
    rows.add_row("one call", f"{unfused.call_seconds * 1e3:.1f} ms", f"{fused.call_seconds * 1e3:.1f} ms")
    show(rows)
    typer.echo(f"\nlargest difference of a logit, fused and unfused: {result.largest_difference:.3g}")
    typer.echo(f"largest logit: {result.largest_logit:.3g}")
    typer.echo("times on a CPU do not predict those on a GPU, where backends with fused kernels come before reference")
    typer.echo(f"\n{result.verdict()}")
