"""Why something was refused: a value, never a bare False."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from fusion_core.errors import BackendError, shown


@dataclass(frozen=True, slots=True)
class Reason:
    """One refusal: what was found and what is needed.

    Attributes:
        code: A short stable word for programs: ``"dtype"``, ``"world_size"``, ``"import"``, ...
        found: What was found, as a phrase: ``"x is float64"``.
        needs: What is needed, as a phrase: ``"bfloat16 or float16"``; empty if nothing would help.
        arg: The argument at fault, if there is one.
        hint: The next step, if there is one: a command, an option, an issue.

    Raises:
        BackendError: for a value of another type, which reports could not print or store as JSON.

    Example:
        >>> print(Reason("dtype", "x is float64", "bfloat16 or float16", arg="x"))
        x is float64, needs bfloat16 or float16
        >>> print(Reason("version", "acme is 1.2", "1.3 or later", hint="pip install -U acme"))
        acme is 1.2, needs 1.3 or later; pip install -U acme
    """

    code: str
    found: str
    needs: str = ""
    arg: str | None = None
    hint: str = ""

    def __post_init__(self) -> None:
        for name in ("code", "found", "needs", "hint"):
            if not isinstance(value := getattr(self, name), str):
                raise BackendError(f"{name} of a Reason is {shown(value)}, needs text")
        if self.arg is not None and not isinstance(self.arg, str):
            raise BackendError(f"arg of a Reason is {shown(self.arg)}, needs text or None")

    def __str__(self) -> str:
        text = f"{self.found}, needs {self.needs}" if self.needs else self.found
        return f"{text}; {self.hint}" if self.hint else text

    def to_dict(self) -> dict[str, str | None]:
        """The reason as plain JSON types."""
        return {"code": self.code, "found": self.found, "needs": self.needs, "arg": self.arg, "hint": self.hint}


class Stage(IntEnum):
    """How far a strategy got at a site: the later the stage, the nearer the miss."""

    UNAVAILABLE = 1
    """Its backend cannot be used on this device."""
    STRUCTURE = 2
    """Its pattern does not match here."""
    REQUIRES = 3
    """The pattern matches here, but the strategy cannot run it correctly."""
    WORTHWHILE = 4
    """It can run here, but is not known to be faster."""
    OPTION = 5
    """It can and should run here, but the user has not switched it on."""
    REPLACEMENT = 6
    """It was chosen, but could not be put into the graph."""
    OUTRANKED = 7
    """It can and should run here, but another strategy comes first."""
    CHOSEN = 8
    """It runs here."""


TUNE = "fusion-core tune measures it on this machine"
"""The hint of a reason that a measurement would resolve."""
