"""Every error that fusion_core raises on purpose."""


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
        text = " ".join(str(error).split())
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001  # the error itself must still be said
        text = "its text cannot be had, as its __str__ raises"
    return f"{name}: {text}" if text else name


class RanksDiffer(FusionError):
    """The ranks of a group run different graphs, and one of them may be inside a kernel that pairs with nothing."""


for _error in (FusionError, ConfigError, BackendError, PatternError, RanksDiffer):
    _error.__module__ = "fusion_core"  # tracebacks then show the path that users import from
del _error
