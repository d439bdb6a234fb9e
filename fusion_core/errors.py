"""Every error that fusion_core raises on purpose, and the words for those of foreign code."""

from __future__ import annotations

from collections.abc import Callable

ORDER = "FUSION_CORE_ORDER"


class FusionError(Exception):
    """Base of all errors of fusion_core."""


class ConfigError(FusionError, ValueError):
    """A configuration value, argument or environment variable that cannot be used."""


class BackendError(FusionError):
    """A backend that cannot be loaded, or that breaks a rule of the plugin interface."""


class PatternError(FusionError):
    """A pattern or dialect whose definition cannot be used, or a pattern name nobody defined."""


def described(error: BaseException) -> str:
    """An error of foreign code as one line: its type and what it says, where it can say anything."""
    name = type(error).__name__
    try:
        text = plain(" ".join(str(error).split()))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # the error itself must still be said
        text = "its text cannot be had, as its __str__ raises"
    return f"{name}: {text}" if text else name


def plain(text: str) -> str:
    """A text with escapes for the characters that a terminal obeys instead of showing."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def shown(value: object, text: Callable[[object], str] = repr) -> str:
    """A value of foreign code in words, whatever its ``__repr__`` or ``__str__`` does."""
    try:
        return plain(text(value))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # it is named in a message all the same
        return f"an object of type {type(value).__name__}"


def blame(error: BaseException, strategy: str, place: str) -> None:
    """Note on an error of a kernel which strategy it came from, where, and the way around it."""
    backend = strategy.partition(".")[0]
    way = f"{ORDER} names the backends to use, and {ORDER}=none uses none"
    error.add_note(f"fusion_core ran {strategy} at {place}; the way around {backend}: {way}")


class RanksDiffer(FusionError):
    """The ranks of a group run different graphs, and one of them may be inside a kernel that pairs with nothing."""


for _error in (FusionError, ConfigError, BackendError, PatternError, RanksDiffer):
    _error.__module__ = "fusion_core"  # tracebacks then show the path that users import from
del _error
