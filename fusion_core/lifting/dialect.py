"""How operators of another framework read in the neutral vocabulary, as data."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fusion_core.errors import PatternError
from fusion_core.lifting.term import Term


@dataclass(frozen=True)
class Reading:
    """How one functional operator reads: as one word of the vocabulary.

    Attributes:
        word: The word's name.
        operands: The word's parameter → the name of the operator's argument.
        constants: The word's parameter → a constant, where the operator has no argument for it.
        results: The word's result names, one for each result of the operator, in the operator's order.

    Example:
        For ``acme::rms_norm(Tensor hidden, Tensor gamma, float epsilon) -> Tensor``; every parameter of the word has
        its place:

        >>> reading = Reading(
        ...     "rms_norm",
        ...     operands={"x": "hidden", "weight": "gamma", "eps": "epsilon"},
        ...     constants={"weight_bias": 0.0, "dtype": None},
        ...     results=("normed",),
        ... )
        >>> from fusion_core.vocabulary import rms_norm
        >>> set(rms_norm.signature.parameters) == {*reading.operands, *reading.constants}
        True
        >>> dialect = Dialect("acme", {"acme::rms_norm": reading})
    """

    word: str
    operands: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    results: tuple[str, ...] = ("result",)

    def read(self, node: fx.Node, schema: Any) -> Term:
        """The term that ``node`` is.

        Raises:
            PatternError: where the operator has no argument of a name that ``operands`` uses.
        """
        arguments = {
            argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()
        }
        arguments |= dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
        operands = dict(self.constants)
        for parameter, argument in self.operands.items():
            if argument not in arguments:
                raise PatternError(f"reading of {schema.name} uses its argument {argument!r}, needs one of {schema}")
            operands[parameter] = arguments[argument]
        return Term(self.word, operands, self._results(node))

    def _results(self, node: fx.Node) -> dict[str, fx.Node]:
        if len(self.results) == 1:
            return {self.results[0]: node}
        picked = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        return {name: picked[index] for index, name in enumerate(self.results) if index in picked}


@dataclass(frozen=True)
class Dialect:
    """Readings of a family of operators.

    Attributes:
        name: What messages call it.
        readings: The operator's qualified name (``"acme::rms_norm"``, or ``"acme::rms_norm.out"`` for one overload) →
            how it reads. Operators that write into an argument are not read.
    """

    name: str
    readings: Mapping[str, Reading]
