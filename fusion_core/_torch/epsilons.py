"""The epsilons of norms, which Dynamo makes inputs of a graph under ``dynamic=True`` and kernels take as numbers."""

from __future__ import annotations

from typing import Any

from torch import fx

__all__ = ["fix_epsilons"]

_REDUCTIONS = frozenset({"mean", "sum", "var", "var_mean", "square_sum", "norm", "linalg_vector_norm"})
_ROOTS = frozenset({"rsqrt", "sqrt", "pow"})
_STEPS = 4
"""Casts and views that may lie between a reduction and the epsilon that is added to it."""


def fix_epsilons(graph_module: fx.GraphModule) -> None:
    """Have Dynamo trace a graph again with the epsilons of its norms as numbers, if they are inputs.

    A float that is an input is one because ``dynamic=True`` was asked for, or because two calls differed in it. An
    epsilon does not change from call to call; as an input it would keep each norm from every kernel. The graph then has
    a guard on the number. Other floats stay inputs.

    Raises:
        TensorifyScalarRestartAnalysis: Dynamo's request to itself to trace again, which a backend may make.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    names = {
        name
        for node in graph_module.graph.nodes
        if (name := _symbol(node)) and any(_is_epsilon(node, user) for user in node.users)
    }
    new = {name for name in names if not TensorifyState.should_specialize(name)}
    if new:
        for name in new:
            TensorifyState.specialize(name)
        raise TensorifyScalarRestartAnalysis


def _symbol(node: fx.Node) -> str | None:
    """The name of the symbol of a float that is an input, read by this node; None for another node."""
    if node.op != "call_method" or node.target != "item":
        return None
    source = node.args[0]
    value = source.meta.get("example_value") if isinstance(source, fx.Node) and source.op == "placeholder" else None
    symbol = getattr(getattr(value, "item_memo", None), "node", None)
    return getattr(getattr(symbol, "_expr", None), "name", None)


def _is_epsilon(number: fx.Node, user: fx.Node) -> bool:
    """Whether a number is added to a reduction of which a root is taken.

    A float that is added to another reduction may change with each call, as a term of a loss does. One that is an
    argument of an operator, such as `torch.nn.functional.rms_norm`, torch makes a number by itself.
    """
    if _called(user) not in ("add", "iadd", "add_"):
        return False
    return any(map(_reduces, user.all_input_nodes)) and any(_called(each) in _ROOTS for each in user.users)


def _reduces(node: fx.Node) -> bool:
    for _ in range(_STEPS):
        if _called(node) in _REDUCTIONS:
            return True
        if not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _called(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
