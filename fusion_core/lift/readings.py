"""Every dialect's readings, applied to the nodes of one graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fusion_core._torch.operators import OpOverload, names_of, schema_of
from fusion_core.errors import PatternError, described
from fusion_core.lift.dialect import Dialect, Reading, Refusal, read
from fusion_core.lift.operator_call import operator_call, operator_of
from fusion_core.lift.term import Term

Found = tuple[Dialect, Reading | tuple[Reading, ...] | Refusal]


class Readings:
    """The readings of several dialects. If several dialects read one operator, the last one applies.

    Attributes:
        problems: Readings that do not fit their operators; these are left out.
        collectives: Names of the operators that read as an all_reduce.
    """

    def __init__(self, dialects: Iterable[Dialect] = ()) -> None:
        self.problems: list[str] = []
        self._readings: dict[str, Found] = {}
        self.collectives: list[str] = []
        for dialect in dialects:
            self._readings |= {name: (dialect, reading) for name, reading in dialect.readings.items()}
        for name, (dialect, _) in self._readings.items():
            if any(reading.word == "all_reduce" for reading in dialect.words_of(name)):
                self.collectives.append(name)
        self._known: dict[OpOverload, Found | None] = {}

    def terms(self, node: fx.Node) -> list[Term] | None:
        """The terms of a node, or None if no dialect reads its operator."""
        operator = operator_of(node)
        if operator is None:
            return None
        if operator not in self._known:  # a graph has many nodes and few operators, and reading a schema is slow
            name = schema_of(operator).name
            overload = f"{name}.{names_of(operator)[1]}"
            self._known[operator] = self._readings.get(overload) or self._readings.get(name)
        found = self._known[operator]
        if found is None:
            return None
        dialect, reading = found
        try:
            call = operator_call(node)
            return [] if call is None else read(reading, call)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # functions of a plugin ran
            words = (
                str(error) if isinstance(error, PatternError) else f"reading of {operator} raised {described(error)}"
            )
            self.problems.append(f"dialect {dialect.name!r}: {words}")
            return []
