"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from fusion_core.config import FusionConfig
from fusion_core.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="Print plain JSON on stdout, everything else on stderr.")]
Order = Annotated[
    str | None,
    typer.Option(
        metavar="A,B", help="Use these backends alone, best first; 'none' for no backend.", show_default=False
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Take a backend that fails to load for an error.")]


def make_config(order: str | None, strict: bool) -> FusionConfig:
    """The configuration that the options ask for; the environment sets what they leave open.

    Raises:
        ConfigError: where the order or a variable ``FUSION_CORE_*`` cannot be used.
    """
    chosen: dict[str, tuple[str, ...] | bool] = {}
    if order is not None:
        names = tuple(name.strip() for name in order.split(","))
        if not all(names):
            raise ConfigError(
                f"--order is {order!r}, needs names of backends separated by commas, or 'none' for no backend"
            )
        chosen["order"] = () if names == ("none",) else names
    if strict:
        chosen["strict"] = True
    return FusionConfig(**chosen)  # type: ignore[arg-type]
