"""The errors that fusion_core raises on purpose, and how the errors of other code are described."""

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
    """A pattern or dialect whose definition cannot be used, or the name of a pattern that does not exist."""


def described(error: BaseException) -> str:
    """An error of other code as one line: its type and its message, if it has one."""
    name = type(error).__name__
    try:
        text = plain(" ".join(str(error).split()))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # the error itself must still be reported
        text = "its text cannot be had, as its __str__ raises"
    return f"{name}: {text}" if text else name


def plain(text: str) -> str:
    """The text, with control characters escaped."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def shown(value: object, text: Callable[[object], str] = repr) -> str:
    """A value of other code as text, even if its ``__repr__`` or ``__str__`` raises."""
    try:
        return plain(text(value))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # the message that names it must still appear
        return f"an object of type {type(value).__name__}"


def blame(error: BaseException, strategy: str, place: str) -> None:
    """Add a note to a kernel's error: the strategy it came from, where it ran, and how to avoid it."""
    backend = strategy.partition(".")[0]
    way = f"{ORDER} names the backends to use, and {ORDER}=none uses none"
    error.add_note(f"fusion_core ran {strategy} at {place}; to avoid {backend}: {way}")


class RanksDiffer(FusionError):
    """The ranks of a group run different graphs, so one of them may wait in a kernel for ranks that never come."""


for _error in (FusionError, ConfigError, BackendError, PatternError, RanksDiffer):
    _error.__module__ = "fusion_core"  # tracebacks then show the path that users import from
del _error
