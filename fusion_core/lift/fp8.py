"""FP8 quantisation in plain torch: every cast to FP8 that a value reaches, and the word that it means."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusion_core.lift.algebra import (
    Atom,
    Function,
    Leaf,
    Plus,
    Product,
    dtype_of,
    one_element,
    same_shape,
    same_size,
    shape_of,
)
from fusion_core.lift.aten.views import RESHAPES
from fusion_core.lift.rules import Read, Rule, is_cheap
from fusion_core.lift.term import Term, Virtual
from fusion_core.reason import Reason
from fusion_core.vocabulary.fp8 import FLOAT8

aten, prims = torch.ops.aten, torch.ops.prims
_CASTS = (prims.convert_element_type.default, aten._to_copy.default)
_REDUCTIONS = (aten.amax.default, aten.max.default, aten.mean.dim, aten.sum.dim_IntList)
_FAR = 40  # nodes to search after a near miss
_NARROW = (*FLOAT8, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.int8, torch.uint8)


def is_quantising_cast(node: fx.Node) -> bool:
    """Whether a node casts a floating value to eight bits."""
    if node.target not in _CASTS or dtype_of(node) not in _NARROW:
        return False
    source = dtype_of(node.args[0])  # type: ignore[arg-type]
    return source is not None and source.is_floating_point


@dataclass
class Reach:
    """The nodes computed from one value, as far as rules can read them, as products of that value.

    Attributes:
        value: The starting value.
        products: Every node read, in graph order → its product in terms of ``value``.
        groups: ``value`` and views of it that split its last dimension → the size of a part.
        casts: The casts to eight bits at the ends.
        misses: Nodes that are near misses → the reasons.
    """

    value: fx.Node
    products: dict[fx.Node, Product] = field(default_factory=dict)
    groups: dict[fx.Node, int] = field(default_factory=dict)
    casts: list[fx.Node] = field(default_factory=list)
    misses: dict[fx.Node, Reason] = field(default_factory=dict)


def reach(
    value: fx.Node, position: dict[fx.Node, int], rule_of: Callable[[fx.Node], Rule | None], known: Read
) -> Reach:
    """Read forward from a value."""
    found = Reach(value, {value: Product.of(value)})
    if isinstance(size := shape_of(value)[-1] if shape_of(value) else None, int):
        found.groups[value] = size

    def read(argument: Any) -> Product:
        return found.products.get(argument) or known(argument) if isinstance(argument, fx.Node) else known(argument)

    waiting = [(position[user], user) for user in value.users]
    heapq.heapify(waiting)
    seen = set(value.users)
    while waiting:
        _, node = heapq.heappop(waiting)
        if node.op != "call_function":
            continue
        if is_quantising_cast(node):
            found.casts.append(node)
            continue
        if group := _group(node, found):
            product: Any = Product.of(node)
            found.groups[node] = group
        elif node.target is aten.max.dim:
            product = Product.of(node)  # two results; the getitem that takes one is read
        else:
            rule = rule_of(node)
            product = rule(node, read) if rule is not None else None
        if isinstance(product, Reason):
            found.misses[node] = product
        if not isinstance(product, Product):
            continue
        found.products[node] = product
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(waiting, (position[user], user))
    return found


def _ends_in_codes(node: fx.Node) -> bool:
    """Whether a node leads to a cast to eight bits, through operations of a quantisation. Most slices do not."""
    waiting, seen = [node], {node}
    while waiting and len(seen) < _FAR:
        for user in waiting.pop(0).users:
            if is_quantising_cast(user):
                return True
            if user not in seen and (is_cheap(user) or dtype_of(user) is None or user.target in _REDUCTIONS):
                seen.add(user)
                waiting.append(user)
    return False


def _group(node: fx.Node, found: Reach) -> int | None:
    """The size of the parts into which a view splits the last dimension of the value."""
    operand = node.args[0] if node.args else None
    if node.target not in (aten.reshape.default, aten.view.default) or not isinstance(operand, fx.Node):
        return None
    source = found.products.get(operand)
    base = source.tensor if source is not None else None
    before, after = shape_of(operand)[-1:], shape_of(node)[-1:]
    if base is not found.value or not (before and after and isinstance(before[0], int) and isinstance(after[0], int)):
        return None
    return after[0] if 0 < after[0] < before[0] and before[0] % after[0] == 0 else None


def fp8_terms(found: Reach) -> Iterator[Term | Reason]:
    """The quantisations that a value reaches, or the reason why there is none."""
    if not found.casts:
        near = (why for node, why in found.misses.items() if why.code != "heads" and _ends_in_codes(node))
        yield from itertools.islice(near, 1)
    first: dict[object, Term] = {}
    for cast in found.casts:
        dtype = dtype_of(cast)
        operand = cast.args[0]
        assert isinstance(operand, fx.Node)
        if dtype not in FLOAT8:
            yield Reason("dtype", f"{operand.name} is cast to {dtype}", f"{FLOAT8[0]} or {FLOAT8[1]}")
            continue
        term = _quantisation(found, cast, found.products[operand], dtype)
        if isinstance(term, Term):
            # several linear layers may each quantise their common input: equal quantisations are duplicates
            same = first.setdefault((term.word, *term.operands.values()), term)
            if same is not term:
                same.duplicates[cast] = "quantized"
                continue
        yield term


def _quantisation(found: Reach, cast: fx.Node, product: Product, dtype: torch.dtype) -> Term | Reason:
    bound, quotient = _unclamped(product)
    if bound is None:
        return Reason("clamp", f"{cast.name} is bounded unequally above and below (clamp)", "one bound for both")
    clamp = min(bound, torch.finfo(dtype).max)
    if quotient.coefficient <= 0:
        found_sign = f"{cast.name} casts {quotient.coefficient:g} times the quotient"
        return Reason("scale", found_sign, "the quotient as it is", "scale")
    if isinstance(atom := quotient.single_factor, Plus):
        return Reason("scale", f"{atom.constant:g} is added before {cast.name}, a zero point", "none", "scale")
    bases = [node for atom, power in quotient.factors if (node := _base(atom, power, found)) is not None]
    if len(bases) != 1:
        return Reason("quantised", f"{cast.name} casts a function of {found.value.name}", "a quotient with its scale")
    base = bases[0]
    divisors = [(atom, power) for atom, power in quotient.factors if atom != Leaf(base)]
    if not divisors:
        found_scale = f"{cast.name} has no scale"
        if quotient.coefficient != 1.0:
            found_scale = f"the scale of {cast.name} is the number {1 / quotient.coefficient:g}"
        return Reason("scale", found_scale, "a scale that is a tensor", "scale")
    if len(divisors) > 1:
        return Reason("scale", f"{cast.name} divides by {len(divisors)} factors", "one scale", "scale")
    ((divisor, power),) = divisors
    if isinstance(divisor, Leaf):
        return _static(found, cast, divisor.node, power, quotient.coefficient, clamp)
    if power != -1.0:
        return Reason("scale", f"{found.value.name} is not divided by its maximum", "a scale for each token", "scale")
    scale = Product.atom(divisor, 1 / quotient.coefficient)
    if isinstance(divisor, Function) and divisor.name == "spread":
        return _dynamic(found, cast, _inside(scale, divisor), clamp, _split(found, divisor.parameter))
    return _dynamic(found, cast, scale, clamp, base)


def _split(found: Reach, size: float) -> fx.Node | None:
    """The view of the value in groups of a size."""
    return next((node for node, group in found.groups.items() if group == size and node is not found.value), None)


def _base(atom: Atom, power: float, found: Reach) -> fx.Node | None:
    if not isinstance(atom, Leaf) or power != 1.0:
        return None
    return atom.node if atom.node is found.value or atom.node in found.groups else None


def _static(
    found: Reach, cast: fx.Node, scale: fx.Node, power: float, coefficient: float, clamp: float
) -> Term | Reason:
    if scale in found.misses:
        return found.misses[scale]
    if not one_element(scale):
        shape = ", ".join(map(str, shape_of(scale)))
        return Reason("scale", f"the scale {scale.name} has the shape [{shape}]", "one element", "scale")
    if dtype_of(scale) != torch.float32:
        return Reason("dtype", f"the scale {scale.name} is {dtype_of(scale)}", "float32", "scale")
    if power != -1.0 or coefficient != 1.0:
        text = f"{coefficient:g} * {scale.name}^{power:g}"
        return Reason("scale", f"{cast.name} multiplies by {text}", "a division by the scale", "scale")
    operands = {"x": found.value, "scale": scale} | _codes(cast, clamp)
    return Term("quantize_static_fp8", operands, {"quantized": cast})


def _dynamic(found: Reach, cast: fx.Node, scale: Product, clamp: float, base: fx.Node | None) -> Term | Reason:
    maximum, floor, powers_of_two = _parts(scale)
    atom = maximum.single_factor
    if not (isinstance(atom, Function) and atom.name == "abs_max"):
        return Reason("scale", f"{cast.name} divides by a function of {found.value.name}", "its largest magnitude")
    if base is None or atom.term.tensor is not base:
        of = atom.term.tensor or "a function"
        return Reason("scale", f"the scale is the maximum of {of}, and {base} is divided", "that of what is divided")
    largest = 1 / maximum.coefficient  # with this scale nothing is larger, even if the clamp is wider
    if largest > clamp * (1 + 1e-5):
        text = f"the scale makes the maximum {largest:g}, and codes are bounded by {clamp:g}"
        return Reason("scale", text, "one and the same", "scale")
    clamp = clamp if math.isclose(largest, clamp, rel_tol=1e-5) else largest
    group = found.groups.get(base)
    if group is None:
        return Reason("scale", f"the last dimension of {base.name} is known only at run time", "a fixed one", "scale")
    if floor is None:
        found_bound = "the scale's lower bound is not a power of two"
        return Reason("scale", found_bound, "a bound before it is rounded", "scale")
    default = 1e-10 if powers_of_two else 1 / (512 * clamp)
    codes = _codes(cast, clamp) | {"min_scale": None if math.isclose(floor, default, rel_tol=1e-5) else floor}
    nodes = _held(found, scale)
    held = nodes[0] if nodes else None
    results: dict[str, fx.Node | Virtual] = {"quantized": cast, "scale": held or Virtual(cast, "scale")}
    duplicates = dict.fromkeys(nodes[1:], "scale")
    whole = same_size(shape_of(base)[-1], shape_of(found.value)[-1])
    if whole and not powers_of_two:
        return Term("quantize_token_fp8", {"x": found.value} | codes, results, duplicates=duplicates)
    column_major = _column_major(held) if held is not None else None
    if column_major is not None:
        results["scale"] = column_major
    form = {
        "group_size": group,
        "scale_format": "ue8m0" if powers_of_two else "float32",
        "scale_layout": "row_major" if column_major is None else "column_major",
    }
    return Term("quantize_group_fp8", {"x": found.value} | codes | form, results, duplicates=duplicates)


def _parts(scale: Product) -> tuple[Product, float | None, bool]:
    """A scale's multiple of a maximum, its lower bound (None if not a power of two), and whether it is rounded up."""
    least, floor, powers_of_two = 0.0, 0.0, False
    atom = scale.single_factor
    if isinstance(atom, Function) and atom.name == "at_least" and _is_power_of_two(atom.term):
        least, scale = atom.parameter * scale.coefficient, _inside(scale, atom)
        atom = scale.single_factor
    if isinstance(atom, Function) and atom.name == "power_of_two_above" and scale.coefficient == 1.0:
        scale, powers_of_two = atom.term, True
        atom = scale.single_factor
    if isinstance(atom, Function) and atom.name == "at_least":
        floor, scale = atom.parameter * scale.coefficient, _inside(scale, atom)
    elif isinstance(atom, Function) and atom.name == "one_if_zero":
        scale = _inside(scale, atom)
    if least and math.frexp(least)[0] != 0.5:
        return scale, None, powers_of_two
    return scale, max(least, floor), powers_of_two


def _inside(product: Product, atom: Function) -> Product:
    return Product(atom.term.factors, atom.term.coefficient * product.coefficient, atom.term.row)


def _is_power_of_two(product: Product) -> bool:
    return isinstance(atom := product.single_factor, Function) and atom.name == "power_of_two_above"


def _codes(cast: fx.Node, clamp: float) -> dict[str, Any]:
    dtype = dtype_of(cast)
    assert dtype is not None
    return {"dtype": dtype, "fp8_max": None if clamp == torch.finfo(dtype).max else clamp}


def _unclamped(product: Product) -> tuple[float | None, Product]:
    """The bound of both sides (infinite if there is none, None if the sides differ) and the product inside."""
    low, high = -math.inf, math.inf
    while isinstance(atom := product.single_factor, Function) and atom.name in ("at_least", "at_most"):
        bound = atom.parameter * product.coefficient
        low, high = (max(low, bound), high) if atom.name == "at_least" else (low, min(high, bound))
        product = _inside(product, atom)
    return high if math.isclose(-low, high, rel_tol=1e-6) else None, product


def _held(found: Reach, scale: Product) -> list[fx.Node]:
    """The nodes that compute the scale in float32, without casts and views of them."""
    nodes: dict[fx.Node, None] = {}
    for node, product in found.products.items():
        if dtype_of(node) != torch.float32 or product.factors != scale.factors:
            continue
        if math.isclose(product.coefficient, scale.coefficient, rel_tol=1e-6) and node.args[0] not in nodes:
            nodes[node] = None
    return list(nodes)


def _column_major(scale: fx.Node) -> fx.Node | None:
    """The node of the scale transposed, copied and transposed back, if the graph has one."""
    views, stack = {scale}, [scale]
    while stack:
        more = [user for user in stack.pop().users if user.target in RESHAPES and user not in views]
        views.update(more)
        stack += more
    for view in views:
        for node in _followed(view, _TRANSPOSES, (aten.clone.default,), _TRANSPOSES):
            if same_shape(shape_of(node), shape_of(view)) and _groups_side_by_side(node.meta["val"]):
                return node
    return None


def _groups_side_by_side(scale: torch.Tensor) -> bool:
    """Whether all tokens' scales of one group are adjacent in memory."""
    expected: Any = 1
    for size, stride in list(zip(scale.shape, scale.stride(), strict=True))[-2::-1]:
        if not same_size(stride, expected):
            return False
        expected = expected * size
    return scale.ndim >= 2 and same_size(scale.stride(-1), expected)


def _followed(node: fx.Node, *targets: tuple[object, ...]) -> Iterator[fx.Node]:
    """The nodes that a node leads to by a sequence of operators of these kinds."""
    if not targets:
        yield node
        return
    for user in node.users:
        if user.target in targets[0]:
            yield from _followed(user, *targets[1:])


_TRANSPOSES = (aten.permute.default, aten.t.default, aten.transpose.int)
