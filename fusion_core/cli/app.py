"""The application: every command of the package ``commands``, and how their errors are printed."""

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

# Newer versions of typer include a copy of click, older ones import it: the base of typer's own class is the right one.
_ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


CLOSED_PIPE = 141
"""Exit status if the reader of stdout went away: 128 plus the number of SIGPIPE, as shells report it."""


class _Group(TyperGroup):
    """Prints each error as one sentence on stderr, without a traceback; exits with a status of `fusion_core.cli`."""

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
            # typer turns it into status 1, which here means that the answer is no
            _fail("stdout was closed before all was written, needs a reader that reads to the end", CLOSED_PIPE)
        except Exception as error:
            if not isinstance(error, _ClickException):
                raise
            _fail(error.format_message())  # type: ignore[attr-defined]
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2) -> NoReturn:
    if message:  # empty after a call without a command, which printed the help
        with suppress(OSError):  # stderr may be on the same full disk
            typer.echo(f"fusion-core: {message}", err=True)
    _drop_unwritten()
    sys.exit(status)


def _sentence(error: OSError) -> str:
    """The message for an error of the operating system, such as a full disk."""
    where = f"{error.filename!r}: " if error.filename is not None else ""
    return f"{where}{error.strerror or error}, needs a place that can be written and read"


def _drop_unwritten() -> None:
    """Discard unwritten output, which would fail again at exit, after the error was printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):  # a test's stream has no file descriptor
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
        """Without a callback, typer would drop the command's name if there were only one command."""

    for found in pkgutil.iter_modules(commands.__path__):
        module = importlib.import_module(f"{commands.__name__}.{found.name}")
        made.command(found.name.replace("_", "-"))(_json_alone(getattr(module, found.name)))
    return made


def _json_alone(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with only its own JSON on stdout if ``--json`` is given: plugins may print too."""

    @functools.wraps(command)
    def run(*, as_json: bool, **given: Any) -> None:
        if not as_json:
            command(as_json=as_json, **given)
            return
        with stdout_to_stderr():
            command(as_json=as_json, **given)

    return run


app = _make()
"""The application for `typer.testing.CliRunner`; the program is `fusion_core.cli.main`."""
