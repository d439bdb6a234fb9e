"""The all_reduces of serving engines, which installed packages offer to be measured beside torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import EntryPoint, entry_points

from fusion_core.errors import ConfigError, described
from fusion_core.groups import AllReduce
from fusion_core.tune.ranks import Ranks

GROUP = "fusion_core.collectives"
"""The entry points: functions without parameters that return a context manager of an `AllReduce`. The call imports the
engine; the context is entered on all ranks, when the default process group exists."""


def offered() -> dict[str, EntryPoint]:
    """The entry points of installed packages, by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def check(name: str) -> None:
    """Raise `ConfigError` if no installed package offers this name."""
    if name not in (points := offered()):
        known = ", ".join(sorted(points)) or "none is installed"
        raise ConfigError(f"--collective is {name!r}, needs one of an engine: {known}")


@contextmanager
def all_reduce_of(name: str | None, ranks: Ranks) -> Iterator[dict[str, AllReduce]]:
    """An engine's all_reduce by its operator; none without a name. Collective: all ranks enter it.

    Raises:
        ConfigError: on all ranks, if the engine cannot be set up on one of them. Gives the rank and the error.
    """
    if name is None:
        yield {}
        return
    made: list[AbstractContextManager[AllReduce]] = []
    found: list[AllReduce] = []
    with ExitStack() as stack:
        # imported on all ranks before any is set up: else the others would wait in its collectives
        _on_all(ranks, name, lambda: made.append(offered()[name].load()()))
        _on_all(ranks, name, lambda: found.append(_entered(stack, made[0])))
        yield {found[0].operator: found[0]}


def _entered(stack: ExitStack, made: AbstractContextManager[AllReduce]) -> AllReduce:
    own = stack.enter_context(made)
    if not isinstance(own, AllReduce):
        raise TypeError(f"it gives {own!r}, needs a fusion_core.AllReduce")
    return own


def _on_all(ranks: Ranks, name: str, work: Callable[[], None]) -> None:
    """Work that may fail on some of the ranks alone; then all of them raise."""
    error = None
    try:
        work()
    except (Exception, SystemExit) as raised:  # noqa: BLE001  # whatever an engine raises, the other ranks must know
        error = described(raised)
    for rank, other in enumerate(ranks.gather(error)):
        if other is not None:
            raise ConfigError(f"--collective {name} cannot be set up: rank {rank}: {other}")
