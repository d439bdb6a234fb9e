"""The requirement on the number of tokens, as data: exact even for counts that are known only at run time."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_core.errors import BackendError
from fusion_core.reason import Reason
from fusion_core.site import Site


@dataclass(frozen=True)
class Tokens:
    """The token count, the rows of x, is within bounds and a multiple of a number.

    In a graph for any number of tokens the bounds are exact, and each call checks the multiple; neither adds a guard.

    Attributes:
        most: The largest count; None for no bound.
        least: The smallest; None for no bound.
        multiple_of: A number that divides each count; None for any.

    Raises:
        BackendError: for a value that is not a whole number, for bounds that no count meets, and without any value.

    Example:
        >>> import torch
        >>> from fusion_core import TensorMeta
        >>> x = TensorMeta((9, 64), torch.bfloat16)
        >>> requirement = Tokens(most=512, multiple_of=4)
        >>> print(requirement)
        at most 512 tokens, in multiples of 4
        >>> print(requirement.unmet(Site("all_reduce", "all_reduce", {"x": x}, {"reduced": x})))
        x has 9 tokens, needs at most 512 tokens, in multiples of 4
    """

    most: int | None = None
    least: int | None = None
    multiple_of: int | None = None

    def __post_init__(self) -> None:
        for name, lowest in (("most", 1), ("least", 0), ("multiple_of", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise BackendError(f"{name} of Tokens is {value!r}, needs a whole number of at least {lowest}")
        if self.most is None and self.least is None and self.multiple_of is None:
            raise BackendError("Tokens has no limit, needs most, least or multiple_of")
        if self.most is not None and max(self._first, 1) > self.most:
            raise BackendError(f"Tokens has no count that is {self}, needs bounds with one between them")

    @property
    def _first(self) -> int:
        """The smallest count that is not 0."""
        of = self.multiple_of or 1
        return -(-max(self.least or 0, 1) // of) * of

    def unmet(self, site: Site) -> Reason | None:
        """The reason if the count does not fit; None for one that is known only at run time."""
        tokens, least, most, of = site.tokens, self.least, self.most, self.multiple_of
        if tokens is None:
            return None
        if (least is None or least <= tokens) and (most is None or tokens <= most) and (of is None or tokens % of == 0):
            return None
        return Reason("tokens", f"x has {_counted(tokens)}", str(self), "x")

    def changes_at(self, site: Site) -> tuple[int, ...] | None:
        """Counts at which the answer changes; None if there are too many to list, so that each call has to ask."""
        if self.multiple_of not in (None, 1):
            return None
        return tuple(count for count in (self.least, None if self.most is None else self.most + 1) if count is not None)

    def __str__(self) -> str:
        least, most = self.least is not None, self.most is not None
        found = f"{self.least} to {self.most}" if least and most else f"at least {self.least}" if least else ""
        found = f"at most {self.most}" if most and not least else found
        words = [f"{found} tokens" if found else "tokens"]
        words += [] if self.multiple_of is None else [f"in multiples of {self.multiple_of}"]
        return (", " if found else " ").join(words)


def _counted(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens != 1)}"
