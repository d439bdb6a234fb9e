"""Sizes that record being read: whether a requirement's answer depends on a size known only at run time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Watch:
    """The sizes of a site that a requirement has read.

    Attributes:
        symbols: Symbols of the sizes that it read individually.
        tokens: Whether it read their product, `Site.tokens`.
    """

    symbols: set[Any] = field(default_factory=set)
    tokens: bool = False

    @property
    def looked(self) -> bool:
        """Whether it read any size that is known only at run time."""
        return self.tokens or bool(self.symbols)

    def note(self, size: object) -> None:
        """Record that a size was read."""
        if not isinstance(size, int):
            self.symbols |= size.node.expr.free_symbols  # type: ignore[attr-defined]


class WatchedSizes(tuple[Any, ...]):
    """A shape or strides that records reads of sizes known only at run time; reading its length is not recorded."""

    watch: Watch

    @classmethod
    def of(cls, sizes: tuple[Any, ...], watch: Watch) -> WatchedSizes:
        """The sizes, watched."""
        made = cls(sizes)
        made.watch = watch
        return made

    def _all(self) -> tuple[Any, ...]:
        for size in tuple.__iter__(self):
            self.watch.note(size)
        return tuple(tuple.__iter__(self))

    def __getitem__(self, place: Any) -> Any:
        found = tuple.__getitem__(self, place)
        if isinstance(place, slice):
            return WatchedSizes.of(found, self.watch)
        self.watch.note(found)
        return found

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __contains__(self, size: object) -> bool:
        return size in self._all()

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, WatchedSizes) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: Any) -> bool:
        return self._all() < tuple(other)

    def __gt__(self, other: Any) -> bool:
        return self._all() > tuple(other)

    def __le__(self, other: Any) -> bool:
        return self._all() <= tuple(other)

    def __ge__(self, other: Any) -> bool:
        return self._all() >= tuple(other)

    def __hash__(self) -> int:
        return hash(self._all())

    def __add__(self, other: Any) -> Any:
        return self._all() + tuple(other)

    def __radd__(self, other: Any) -> Any:
        return tuple(other) + self._all()

    def __mul__(self, times: Any) -> Any:
        return self._all() * times

    def __reversed__(self) -> Iterator[Any]:
        return iter(self._all()[::-1])

    def __repr__(self) -> str:
        return repr(self._all())

    def count(self, size: Any) -> int:
        """The number of occurrences of a size."""
        return self._all().count(size)

    def index(self, size: Any, *bounds: Any) -> int:
        """The index of a size."""
        return self._all().index(size, *bounds)
