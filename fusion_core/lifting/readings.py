"""What the operators of other frameworks read as: every dialect's readings, applied to the nodes of one graph."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fusion_core.errors import PatternError
from fusion_core.lifting.dialect import Dialect, Reading
from fusion_core.lifting.term import Term


class Readings:
    """The readings of several dialects; the last one that names an operator counts.

    Attributes:
        problems: Readings that do not fit their operators; each is left out.
    """

    def __init__(self, dialects: Iterable[Dialect] = ()) -> None:
        self.problems: list[str] = []
        self._readings = {
            name: (dialect, reading) for dialect in dialects for name, reading in dialect.readings.items()
        }

    def terms(self, node: fx.Node) -> list[Term] | None:
        """The terms that a node reads as; None where no dialect knows its operator."""
        found = self._find(node)
        if found is None:
            return None
        dialect, reading = found
        try:
            return [reading.read(node, node.target._schema)]  # type: ignore[union-attr]
        except PatternError as error:
            self.problems.append(f"dialect {dialect.name!r}: {error}")
            return []

    def _find(self, node: fx.Node) -> tuple[Dialect, Reading] | None:
        if not self._readings or not isinstance(node.target, torch._ops.OpOverload):
            return None
        name = node.target._schema.name
        overload = f"{name}.{node.target._overloadname}"
        return self._readings.get(overload) or self._readings.get(name)
