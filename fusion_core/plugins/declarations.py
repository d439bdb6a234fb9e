"""Checks of the types in a plugin's declarations, made once, when it loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion_core.errors import BackendError, described
from fusion_core.plugins.strategy import Strategy
from fusion_core.plugins.variant import Variant


def check_printable(what: str, name: Any) -> None:
    """Raise `BackendError` if a name is not text, or has characters that a terminal obeys instead of showing."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise BackendError(f"{what} is {name!r}, needs text of printable characters")


def check_fields(strategy: Strategy) -> None:
    """Raise `BackendError` if a field of a strategy or a variant does not have the type in its declaration."""
    check_printable("the name of a strategy", strategy.name)
    check_printable(f"the pattern of {strategy.name}", strategy.pattern)
    of = f"strategy {strategy.name!r}"
    _check(of, strategy, "impl", callable(strategy.impl), "something to call")
    _check(of, strategy, "reduces_means", isinstance(strategy.reduces_means, bool), "True or False")
    _check(of, strategy, "settled", _texts(strategy.settled), "a tuple of names")
    variants = strategy.variants
    are_variants = isinstance(variants, tuple | list) and all(isinstance(each, Variant) for each in variants)
    _check(of, strategy, "variants", are_variants, "a tuple of Variant objects")
    checked: set[int] = set()
    _check_shared(of, strategy, checked)
    for variant in variants:
        if variant.name != "":
            check_printable(f"the name of a variant of {strategy.name}", variant.name)
        of = f"variant {variant.name!r} of strategy {strategy.name!r}"
        _check(of, variant, "impl", variant.impl is None or callable(variant.impl), "something to call or None")
        _check_shared(of, variant, checked)


def _check_shared(of: str, declared: Strategy | Variant, checked: set[int]) -> None:
    """Check the fields that a strategy and a variant both have, each requirement that variants share once."""
    _check(of, declared, "rank", type(declared.rank) is int, "a whole number")
    _check(of, declared, "batch_invariant", isinstance(declared.batch_invariant, bool), "True or False")
    untested, option, outputs = declared.untested, declared.option, declared.outputs
    printable = isinstance(untested, str) and untested.isprintable()
    _check(of, declared, "untested", untested is None or printable, "a sentence of printable characters or None")
    _check(of, declared, "option", option is None or isinstance(option, str), "a word or None")
    _check(of, declared, "outputs", outputs is None or _texts(outputs), "a tuple of names or None")
    arguments = declared.arguments
    # a compiled graph contains them as text
    plain = isinstance(arguments, Mapping) and all(
        isinstance(name, str) and (value is None or isinstance(value, bool | int | float | str))
        for name, value in arguments.items()
    )
    _check(of, declared, "arguments", plain, "a mapping of names to numbers, text, True, False or None")
    for name in ("requires", "worthwhile"):
        given = getattr(declared, name)
        _check(of, declared, name, isinstance(given, tuple | list), "a tuple of requirements")
        for requirement in given:
            if id(requirement) not in checked:
                _check_requirement(of, name, requirement)
                checked.add(id(requirement))


def _texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(name, str) for name in value)


def _check(of: str, declared: Strategy | Variant, name: str, holds: bool, needs: str) -> None:
    if not holds:
        raise BackendError(f"{of} has {name} {getattr(declared, name)!r}, needs {needs}")


def _check_requirement(of: str, name: str, requirement: Any) -> None:
    """Check a requirement: its text is part of the support table, and its ``repr`` of the compile-cache key."""
    # `isinstance` of a protocol takes ten times as long, for some hundreds of requirements
    if isinstance(requirement, type) or not callable(getattr(requirement, "unmet", None)):
        raise BackendError(f"{of} has {requirement!r} among {name}, needs requirements, which have unmet(site)")
    try:
        texts = str(requirement), repr(requirement)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        kind = type(requirement).__name__
        raise BackendError(f"{of}: {kind} among {name} raised {described(error)} when asked for its text") from error
    if not texts[0].isprintable():
        raise BackendError(f"{of} has {texts[0]!r} among {name}, needs printable characters")
