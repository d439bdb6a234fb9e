"""The message of the command line when the user's own code raises."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import typer

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def failed(error: BaseException) -> typer.Exit:
    """Print the traceback of an error in the user's code, without fusion_core's frames; returns the exit to raise."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace or error.__traceback__)
    typer.echo("".join(lines), err=True, nl=False)
    if "default process group twice" in str(error):
        found = "a process group is there already, needs a check of torch.distributed.is_initialized()"
        typer.echo(f"fusion-core: {found}", err=True)
    return typer.Exit(1)
