"""The application: every command of the package ``commands``, and what becomes of their errors."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from fusion_core.cli import commands
from fusion_core.cli.output import stdout_to_stderr
from fusion_core.errors import FusionError

# Newer versions of typer bring their own click, older ones use the package: typer's own subclass knows which.
_ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


CLOSED_PIPE = 141
"""Exit status where the reader of stdout left: 128 and the number of SIGPIPE, as shells report it of other programs."""


class _Group(TyperGroup):
    """Says every error as one sentence on stderr, without a traceback, and exits by the project's statuses."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse, run and exit."""
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
        except FusionError as error:
            _fail(str(error))
        except typer.Abort:
            _fail("aborted")
        except OSError as error:
            _fail(_sentence(error))
        except SystemExit as ended:
            if not isinstance(ended.__context__, BrokenPipeError):
                raise
            # typer makes status 1 of it, which here means that the answer is no
            _fail("stdout was closed before all was written, needs a reader that reads to the end", CLOSED_PIPE)
        except Exception as error:
            if not isinstance(error, _ClickException):
                raise
            _fail(error.format_message())  # type: ignore[attr-defined]
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2) -> NoReturn:
    if message:  # a call without a command has shown the help, and has nothing to add
        with suppress(OSError):  # stderr may be the same full disk
            typer.echo(f"fusion-core: {message}", err=True)
    _drop_unwritten()
    sys.exit(status)


def _sentence(error: OSError) -> str:
    """What the system refused: of a full disk, of stdout that cannot be written."""
    where = f"{error.filename!r}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}, needs a place that can be written and read"


def _drop_unwritten() -> None:
    """What could not be written would fail again when the interpreter ends, behind the sentence that says so."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # a stream of a test has no number
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream.fileno())
                os.close(nothing)


def _make() -> typer.Typer:
    made = typer.Typer(
        cls=_Group,
        help="Fused collectives for tensor-parallel inference in PyTorch.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @made.callback()
    def _root() -> None:
        """A callback keeps commands named even while there is one alone."""

    for found in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{found.name}")
        made.command(found.name.replace("_", "-"))(_json_alone(getattr(module, found.name)))
    return made


def _json_alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with nothing but its own JSON on stdout where that is asked for: plugins print as they like."""

    @functools.wraps(command)
    def run(*, as_json: bool, **given: Any) -> None:
        if not as_json:
            command(as_json=as_json, **given)
            return
        with stdout_to_stderr():
            command(as_json=as_json, **given)

    return run


app = _make()
"""What `typer.testing.CliRunner` runs; `fusion_core.cli.main` is the program."""
