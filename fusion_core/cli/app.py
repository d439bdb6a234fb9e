"""The application: every command of the package ``commands``, and what becomes of their errors."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from fusion_core.cli import commands
from fusion_core.errors import FusionError

# Newer versions of typer bring their own click, older ones use the package: typer's own subclass knows which.
_ClickException = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


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
        except Exception as error:
            if not isinstance(error, _ClickException):
                raise
            _fail(error.format_message())  # type: ignore[attr-defined]
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> NoReturn:
    if message:  # a call without a command has shown the help, and has nothing to add
        typer.echo(f"fusion-core: {message}", err=True)
    sys.exit(2)


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
        made.command(found.name.replace("_", "-"))(getattr(module, found.name))
    return made


app = _make()
"""What `typer.testing.CliRunner` runs; `fusion_core.cli.main` is the program."""
