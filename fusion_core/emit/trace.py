"""A strategy as a graph of operators, traced on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_core._torch.tensors import FakeTensor
from fusion_core.config import FusionConfig
from fusion_core.errors import FusionError, described, shown
from fusion_core.match.matcher import Match
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason

Decompositions = Mapping[Any, Callable[..., Any]]


class Unplaceable(FusionError):
    """A chosen strategy cannot be inserted into the graph, for the given reason."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


def fake_mode(tensors: Iterable[Any]) -> AbstractContextManager[Any]:
    """The fake mode of fake tensors, as a context in which to run operators on them."""
    found = next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), None)
    return nullcontext() if found is None else found


def trace(
    strategy: Strategy,
    found: Match,
    tensors: Mapping[str, torch.Tensor],
    decompositions: Decompositions,
    config: FusionConfig,
) -> fx.GraphModule:
    """The strategy as a graph from its tensors to the match's live outputs, without unused nodes.

    Its other arguments, including settings of the user, become constants of the graph. It is traced under the fake
    mode of its tensors: Inductor only sets the mode, and ``new_full`` or ``zeros`` would make a real tensor.

    Raises:
        Unplaceable: The strategy's code raises, or contains a tensor that is not an argument.
    """
    accepted = strategy.accepts(found.pattern) | set(found.pattern.tensors)
    constants = {name: value for name, value in found.scalars.items() if name in accepted}
    constants |= strategy.settings(found.pattern, config)
    names = found.pattern.outputs if strategy.outputs is None else strategy.outputs

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        returned = strategy.impl(**dict(zip(tensors, given, strict=True)), **constants)
        results = dict(zip(names, returned if isinstance(returned, tuple | list) else (returned,), strict=True))
        return tuple(results[name] for name in found.outputs)

    try:
        with torch.no_grad(), fake_mode(tensors.values()):
            traced: fx.GraphModule = make_fx(run, dict(decompositions))(*tensors.values())
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # a plugin's code ran: anything it raises becomes the reason at this site and does not affect other sites
        text = f"tracing {strategy.name} raised {described(error)}"
        raise Unplaceable(Reason("trace", text, "an impl that runs on fake tensors")) from error
    traced.graph.eliminate_dead_code()
    if wrong := next((each for each in returned(traced) if not _is_tensor(each)), None):
        raise Unplaceable(Reason("trace", f"{strategy.name} returns {shown(wrong)}", "tensors"))
    if held := next((node for node in traced.graph.nodes if node.op == "get_attr"), None):
        text = f"{strategy.name} contains a constant tensor ({held.target})"
        raise Unplaceable(Reason("trace", text, "tensors that come in as arguments"))
    return traced


def _is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def returned(traced: fx.GraphModule) -> list[fx.Node]:
    """The nodes that a traced strategy returns, in the order of the match's live outputs."""
    return cast(list[fx.Node], list(cast(tuple[Any, ...], traced.graph.output_node().args[0])))
