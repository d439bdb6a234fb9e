"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from fusion_core.config import FusionConfig
from fusion_core.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print plain JSON on stdout, everything else on stderr.")]
Order = Annotated[
    str | None,
    typer.Option(metavar="A,B", help="Use only these backends, best first; 'none' for no backend.", show_default=False),
]
Strict = Annotated[bool, typer.Option("--strict", help="Treat a backend that fails to load as an error.")]
Options = Annotated[
    str | None,
    typer.Option(metavar="A.X,B.Y", help="Switch on these options of backends.", show_default=False),
]


def make_config(order: str | None = None, strict: bool = False, options: str | None = None) -> FusionConfig:
    """The configuration from these options; the environment provides the rest.

    Raises:
        ConfigError: if the order, the options or a variable ``FUSION_CORE_*`` cannot be used.
    """
    chosen: dict[str, tuple[str, ...] | bool] = {}
    if order is not None:
        names = _names("order", order, "names of backends separated by commas, or 'none' for no backend")
        chosen["order"] = () if names == ("none",) else names
    if options is not None:
        needs = "options of backends separated by commas, each as <backend>.<option>"
        chosen["options"] = _names("options", options, needs)
    if strict:
        chosen["strict"] = True
    return FusionConfig(**chosen)  # type: ignore[arg-type]


def _names(option: str, text: str, needs: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(f"--{option} is {text!r}, needs {needs}")
    return names
