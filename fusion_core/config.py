"""What a user may choose, and the environment variables that set its defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from fusion_core.errors import ConfigError

DETERMINISTIC = "deterministic"
NUMERICS = ("default", DETERMINISTIC)
PREFIX = "FUSION_CORE_"
KEPT = 256
"""The number of reports that a process keeps by default."""
SETTINGS = ("max_tokens", "numerics")
"""Fields of a config that a strategy's ``impl`` may take by name."""

T = TypeVar("T")


def _order(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if names == ("none",):
        return ()
    if not all(names):
        raise ValueError(text)
    return names


def _options(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(text)
    return names


def _flag(text: str) -> bool:
    return {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}[
        text.lower()
    ]


def _numerics(text: str) -> str:
    if text not in NUMERICS:
        raise ValueError(text)
    return text


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


_ENVIRONMENT: dict[str, tuple[Callable[[str], Any], str]] = {
    "order": (_order, "names of backends separated by commas, or 'none' for no backend"),
    "strict": (_flag, "one of 1, true, yes, on, 0, false, no, off"),
    "numerics": (_numerics, f"one of {', '.join(NUMERICS)}"),
    "limit": (_count, "a whole number, 0 or more"),
    "max_tokens": (_positive, "a whole number, 1 or more"),
    "merge": (_flag, "one of 1, true, yes, on, 0, false, no, off"),
    "table": (str, "the path of a file that fusion-core tune wrote, or 'none'"),
    "reports": (_positive, "a whole number, 1 or more"),
    "options": (_options, "options of backends separated by commas, each as <backend>.<option>"),
}


def _default(name: str, otherwise: T) -> T:
    """A field whose default is read from the environment when a config is made, not on import."""

    def read() -> Any:
        variable = PREFIX + name.upper()
        text = os.environ.get(variable, "")
        if not text:
            return otherwise
        parse, valid = _ENVIRONMENT[name]
        try:
            return parse(text)
        except (ValueError, KeyError):
            raise ConfigError(f"{variable} is {text!r}, needs {valid}") from None

    result: T = field(default_factory=read)
    return result


@dataclass(frozen=True)
class FusionConfig:
    """Which backends may run, and how; every default can be set by an environment variable.

    Attributes:
        order: Backends to use, best first; each of them must load. ``()`` for none. None (default) for every backend
            that loads: ranked by measured time where the table has it, else by name, with reference last.
            ``FUSION_CORE_ORDER=acme,flashinfer``.
        strict: A broken plugin or table is an error instead of a warning. ``FUSION_CORE_STRICT=1``.
        numerics: ``"deterministic"`` makes one choice for all sizes, among strategies whose results for a row do not
            depend on the rest of the batch, bit for bit; see docs/choosing.md.
            ``FUSION_CORE_NUMERICS=deterministic``.
        limit: The most rewrites per graph, to find a wrong one by bisection; None for all.
            ``FUSION_CORE_LIMIT=3``.
        max_tokens: Capacity of the backends' workspaces in tokens; None for each backend's default.
            ``FUSION_CORE_MAX_TOKENS=2048``.
        merge: Merge all_reduces of one process group whose results are only added together into one all_reduce of the
            sum. Correct only if all ranks of the group compile the same graphs: if one rank's graph breaks between two
            of them, its separate all_reduces cannot pair with the merged one. An all_reduce may then also run before
            one that the model calls first, if the latter's site needs its result. ``FUSION_CORE_MERGE=1``.
        table: The path of a table that `fusion-core tune` wrote; strategies are chosen by its measured times.
            ``"none"`` for no table. None for the user's own table for this machine, else the one in the package.
            ``FUSION_CORE_TABLE=/path/to/table.json``.
        reports: How many reports this process keeps, the newest ones; see `fusion_core.reports`.
            ``FUSION_CORE_REPORTS=1000``.
        options: Options of backends to switch on, each as ``"<backend>.<option>"``; see `Strategy.option`.
            ``FUSION_CORE_OPTIONS=acme.fast,acme.overlap``.

    Raises:
        ConfigError: for an argument or environment variable whose value is of the wrong type or out of range.

    Example:
        >>> FusionConfig(order=["acme", "reference"]).order
        ('acme', 'reference')
        >>> FusionConfig(numerics="fast")
        Traceback (most recent call last):
            ...
        fusion_core.ConfigError: numerics is 'fast', needs one of default, deterministic
    """

    order: tuple[str, ...] | None = _default("order", None)
    strict: bool = _default("strict", False)
    numerics: str = _default("numerics", "default")
    limit: int | None = _default("limit", None)
    max_tokens: int | None = _default("max_tokens", None)
    options: tuple[str, ...] = _default("options", ())
    merge: bool = _default("merge", False)
    table: str | None = _default("table", None)
    reports: int = _default("reports", KEPT)

    def __post_init__(self) -> None:
        if isinstance(self.order, str) or not (self.order is None or _all(self.order, str)):
            raise ConfigError(f"order is {self.order!r}, needs a tuple of backend names, or None")
        if self.order is not None:
            object.__setattr__(self, "order", tuple(self.order))
            if twice := _twice(self.order):
                raise ConfigError(f"order names {twice} twice, needs each backend once")
        for name in ("strict", "merge"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} is {value!r}, needs True or False")
        if self.numerics not in NUMERICS:
            raise ConfigError(f"numerics is {self.numerics!r}, needs one of {', '.join(NUMERICS)}")
        if self.table is not None and (not isinstance(self.table, str) or not self.table):
            raise ConfigError(f"table is {self.table!r}, needs the path of a file, 'none' for no table, or None")
        if isinstance(self.reports, bool) or not isinstance(self.reports, int) or self.reports < 1:
            raise ConfigError(f"reports is {self.reports!r}, needs a whole number of at least 1")
        for name, least in (("limit", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} is {value!r}, needs a whole number of at least {least}, or None")
        if not _all(self.options, str):
            raise ConfigError(f"options is {self.options!r}, needs a tuple of names, each as '<backend>.<option>'")
        object.__setattr__(self, "options", tuple(self.options))
        if twice := _twice(self.options):
            raise ConfigError(f"options names {twice} twice, needs each option once")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        values: Mapping[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, tuple | list) and all(isinstance(value, kind) for value in values)


def _twice(names: tuple[str, ...]) -> str:
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def check_environment() -> None:
    """Raise `ConfigError` for an unknown variable ``FUSION_CORE_*``, so that a misspelt name is reported."""
    known = {PREFIX + name.upper() for name in _ENVIRONMENT}
    if unknown := sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known):
        raise ConfigError(f"the environment has {', '.join(unknown)}, needs names among {', '.join(sorted(known))}")
