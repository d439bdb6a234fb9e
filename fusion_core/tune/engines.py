"""The all_reduces of serving engines, which installed packages offer to be measured beside torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import EntryPoint, entry_points

from fusion_core.errors import ConfigError, described
from fusion_core.groups import AllReduce

GROUP = "fusion_core.collectives"
"""The entry points: functions without parameters that return a context manager of an `AllReduce`. It is entered on all
ranks, when the default process group exists."""


def offered() -> dict[str, EntryPoint]:
    """The entry points of installed packages, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


@contextmanager
def all_reduces(names: Sequence[str]) -> Iterator[dict[str, AllReduce]]:
    """The all_reduces of these engines, by their operators. Collective: all ranks enter it.

    Raises:
        ConfigError: no installed package offers a name, or its engine cannot be set up here.
    """
    points = offered()
    if unknown := [name for name in names if name not in points]:
        known = ", ".join(sorted(points)) or "none is installed"
        raise ConfigError(f"--collective is {', '.join(map(repr, unknown))}, needs one of an engine: {known}")
    found: dict[str, AllReduce] = {}
    with ExitStack() as stack:
        for name in names:
            try:
                make: Callable[[], AbstractContextManager[AllReduce]] = points[name].load()
                own = stack.enter_context(make())
            except (Exception, SystemExit) as error:  # an engine's set-up may raise anything
                raise ConfigError(f"--collective {name} cannot be set up: {described(error)}") from error
            if not isinstance(own, AllReduce):
                raise ConfigError(f"--collective {name} gives {own!r}, needs a fusion_core.AllReduce")
            found[own.operator] = own
        yield found
