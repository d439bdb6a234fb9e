"""Where a graph ends that is being compiled: at a graph break, or where the model's own code does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fusion_core.reason import Reason

_end: ContextVar[Any] = ContextVar("fusion_core_graph_end", default=None)


@contextmanager
def compiling(graph_module: Any) -> Iterator[None]:
    """While this block runs, the graph is compiled that Dynamo captured in ``graph_module``."""
    token = _end.set(getattr(graph_module, "compile_subgraph_reason", None))  # Dynamo's, of why it ends there
    try:
        yield
    finally:
        _end.reset(token)


def ending(before: str, word: str) -> Reason:
    """Why a word cannot follow a value that nothing in its graph uses: the graph ends behind it.

    Args:
        before: What gives the value.
        word: The word.
    """
    why, needs = _end.get(), f"{word} of it"
    if why is None:  # compiled by other means than this library's own backends: nobody said
        return Reason("graph_end", f"the graph ends here, behind {before}", needs)
    if not why.graph_break:
        return Reason("graph_end", f"the graph ends here, behind {before}: the model's code does too", needs)
    said = next(iter(str(why.reason).splitlines()), "")
    hint = f"Dynamo says: {said}; TORCH_LOGS=graph_breaks says where"
    return Reason("graph_break", f"the graph ends here (graph break), behind {before}", needs, hint=hint)
