"""Whether what a plugin declares is of the types that it must be of: asked once, when it loads."""

from __future__ import annotations

from typing import Any

from fusion_core.errors import BackendError, described
from fusion_core.plugins.requirements import Requirement
from fusion_core.plugins.strategy import Strategy


def check_printable(what: str, name: Any) -> None:
    """Raise `BackendError` where a name is no text, or has characters that a terminal obeys instead of showing."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise BackendError(f"{what} is {name!r}, needs text of printable characters")


def check_fields(strategy: Strategy) -> None:
    """Raise `BackendError` where a field of a strategy is of another type than it is declared with."""
    check_printable("the name of a strategy", strategy.name)
    check_printable(f"the pattern of {strategy.name}", strategy.pattern)
    _check(strategy, "impl", callable(strategy.impl), "something to call")
    _check(strategy, "rank", type(strategy.rank) is int, "a whole number")
    _check(strategy, "batch_invariant", isinstance(strategy.batch_invariant, bool), "True or False")
    untested, option, outputs = strategy.untested, strategy.option, strategy.outputs
    said = isinstance(untested, str) and untested.isprintable()
    _check(strategy, "untested", untested is None or said, "a sentence of printable characters or None")
    _check(strategy, "option", option is None or isinstance(option, str), "a word or None")
    texts = isinstance(outputs, tuple | list) and all(isinstance(name, str) for name in outputs)
    _check(strategy, "outputs", outputs is None or texts, "a tuple of names or None")
    for name in ("requires", "worthwhile"):
        given = getattr(strategy, name)
        _check(strategy, name, isinstance(given, tuple | list), "a tuple of requirements")
        for requirement in given:
            _check_requirement(strategy, name, requirement)


def _check(strategy: Strategy, name: str, holds: bool, needs: str) -> None:
    if not holds:
        raise BackendError(f"strategy {strategy.name!r} has {name} {getattr(strategy, name)!r}, needs {needs}")


def _check_requirement(strategy: Strategy, name: str, requirement: Any) -> None:
    """Its words are in the support table, and its ``repr`` in the key of the compile cache."""
    if isinstance(requirement, type) or not isinstance(requirement, Requirement):
        raise BackendError(
            f"strategy {strategy.name!r} has {requirement!r} among {name}, needs requirements, which have unmet(site)"
        )
    try:
        texts = str(requirement), repr(requirement)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind = type(requirement).__name__
        raise BackendError(
            f"strategy {strategy.name!r}: {kind} among {name} raised {described(error)} when asked for its text"
        ) from error
    if not texts[0].isprintable():
        raise BackendError(f"strategy {strategy.name!r} has {texts[0]!r} among {name}, needs printable characters")
