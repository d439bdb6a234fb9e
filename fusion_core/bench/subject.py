"""The subject of a measurement: the user's function, or a named shape."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fusion_core.bench.shapes import named
from fusion_core.errors import ConfigError
from fusion_core.user_code import Call, as_call, find

if TYPE_CHECKING:
    from fusion_core.bench.stack import Stack

BATCHES = (1, 8, 32, 128)
LAYERS, CONTEXT = 4, 1024


class Function:
    """The user's function ``MODULE:FUNCTION``, called for every batch size if it has a parameter ``batch``.

    Args:
        spec: The name as the user wrote it.
        batches: The batch sizes that the user gave; None for `BATCHES`.

    Raises:
        ConfigError: if there is no such function, if it needs other arguments, or if batch sizes are given and it has
            no parameter ``batch``.
    """

    def __init__(self, spec: str, batches: Sequence[int] | None) -> None:
        self.spec = spec
        self._function: Callable[..., Any] = find(spec)
        kinds = {name: parameter.kind for name, parameter in _parameters(self._function).items()}
        takes_batch = kinds.get("batch") in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        if others := [name for name in _needed(self._function) if not (takes_batch and name == "batch")]:
            raise ConfigError(f"{spec} takes {', '.join(others)}, needs no argument, or batch alone")
        if batches is not None and not takes_batch:
            raise ConfigError(f"--batches is given and {spec} takes no batch, needs a parameter of this name")
        self.batches: tuple[int | None, ...] = tuple(batches or BATCHES) if takes_batch else (None,)

    def __str__(self) -> str:
        return self.spec

    def to_dict(self) -> dict[str, Any]:
        """The function's name as plain JSON types."""
        return {"function": self.spec}

    def call(self, batch: int | None) -> Call:
        """The model and its arguments for a batch size."""
        returned = self._function() if batch is None else self._function(batch=batch)
        return as_call(returned, self.spec)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError):  # some functions that are not written in Python have no signature
        return {}


def _needed(function: Callable[..., Any]) -> list[str]:
    """The names of a function's required arguments."""
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in _parameters(function).items()
        if parameter.default is parameter.empty and parameter.kind not in rest
    ]


@dataclass
class NamedShape:
    """A decoder stack of a named shape; see `fusion_core.bench.stack`.

    Raises:
        ConfigError: if no shape has this name.
    """

    name: str
    layers: int
    context: int
    batches: tuple[int, ...]
    _stack: Stack | None = None

    def __post_init__(self) -> None:
        named(self.name, 1)

    def __str__(self) -> str:
        return f"{self.name}, {self.layers} layer{'s' * (self.layers > 1)}, context {self.context}"

    def to_dict(self) -> dict[str, Any]:
        """The shape's name and sizes as plain JSON types."""
        sizes = named(self.name, 1).to_dict()
        return {"shape": self.name, "sizes": sizes, "layers": self.layers, "context": self.context}

    def call(self, batch: int | None) -> Call:
        """The stack and its input; the same stack for every batch size.

        Raises:
            ConfigError: if it cannot be split evenly over the default process group.
        """
        from fusion_core.bench.stack import Stack, tokens

        shape = named(self.name, dist.get_world_size())
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if self._stack is None:
            group = dist.group.WORLD
            assert group is not None
            self._stack = Stack(shape, self.layers, max(self.batches), self.context, group, device)
        return Call(self._stack, (tokens(shape, batch or 1, device),))


def subject(
    function: str | None, shape: str | None, layers: int | None, context: int | None, batches: Sequence[int] | None
) -> Function | NamedShape:
    """The subject that the arguments of ``fusion-core bench`` name.

    Raises:
        ConfigError: if they name both a function and a shape or neither, or if the subject cannot be measured.
    """
    if (function is None) == (shape is None):
        found = "neither MODULE:FUNCTION nor --shape" if shape is None else "both MODULE:FUNCTION and --shape"
        raise ConfigError(f"found {found}, needs one of them; --list-shapes prints the shapes")
    if shape is not None:
        return NamedShape(shape, layers or LAYERS, context or CONTEXT, tuple(batches or BATCHES))
    assert function is not None
    for name, value in (("layers", layers), ("context", context)):
        if value is not None:
            raise ConfigError(f"--{name} is given with MODULE:FUNCTION, needs --shape, whose stack it sizes")
    return Function(function, batches)


def parse_batches(text: str | None) -> tuple[int, ...] | None:
    """``"1,8"`` as numbers.

    Raises:
        ConfigError: for any other text, and for repeated numbers.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise ConfigError(f"--batches is {text!r}, needs different whole numbers of at least 1 separated by commas")
    return tuple(map(int, parts))
