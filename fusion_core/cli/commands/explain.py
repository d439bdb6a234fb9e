"""``fusion-core explain``: what fusion would do to a user's model, and why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fusion_core
from fusion_core.cli.options import Json, Options, Order, Strict, make_config
from fusion_core.cli.output import check_can_write, print_json
from fusion_core.cli.process_group import check_same, choices, process_group
from fusion_core.cli.user_code import failed
from fusion_core.config import FusionConfig
from fusion_core.errors import ConfigError, FusionError
from fusion_core.plugins.registry import Registry
from fusion_core.report.report import Report
from fusion_core.user_code import as_call, find


def explain(
    function: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FUNCTION", help="Returns (model, args) or (model, args, kwargs). Also file.py:FUNCTION."
        ),
    ],
    order: Order = None,
    strict: Strict = False,
    options: Options = None,
    html: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Also write the report as an HTML page.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what would be fused in a model, by which backend, and why the rest would not: a dry run.

    The model runs once, unfused. Under torchrun every rank takes part and rank 0 prints. Without torchrun, FUNCTION is
    called with a process group of one process.
    """
    config = make_config(order, strict, options)
    if html is not None:
        check_can_write("--html", html)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the report names the backends that fail to load
        registry = Registry.load(config)  # an order or option that cannot be used is an error before the model is built
    build = find(function)
    with process_group() as rank:
        check_same(**choices(config, registry))
        report = _run(function, build, config)
    if rank:
        return
    if html is not None:
        try:
            report.to_html(html)
        except OSError as error:
            raise ConfigError(f"--html {html} cannot be written: {error}") from error
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))


def _run(spec: str, build: Callable[[], Any], config: FusionConfig) -> Report:
    try:
        returned = build()
    except (Exception, SystemExit) as error:
        raise failed(error) from error
    call = as_call(returned, spec)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fusion_core: backend", RuntimeWarning)
            return fusion_core.explain(call.model, *call.args, config=config, **call.kwargs)
    except FusionError:
        raise
    except (Exception, SystemExit) as error:
        raise failed(error) from error
