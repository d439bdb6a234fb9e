"""No mutation of a core requirement survives the kit: not always true, not always false, not off by one."""

import ast
import inspect
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fusion_core import (
    Arch,
    Attribute,
    Contiguous,
    Dimensions,
    DType,
    DTypeAttribute,
    FixedTokens,
    KnownFaster,
    LiveOutputs,
    MultipleOf,
    OnDevice,
    Present,
    Reason,
    SameDType,
    SizeBetween,
    Strategy,
    Tokens,
    WorldSize,
    hookimpl,
)
from fusion_core.patterns.plain import all_reduce_add_rms_norm
from fusion_core.plugins import known_faster, requirements, size_requirements, token_counts
from fusion_core.samples.requirement_sides import sides
from fusion_core.testing import CHECKS, CheckFailed, subjects

(CHECK,) = [check for check in CHECKS if check.name == "refuses_on_the_wrong_side_of_each_requirement"]
BF16, FP16 = torch.bfloat16, torch.float16

REQUIREMENTS = [
    OnDevice("cuda"),
    Arch("sm_90", "sm_100"),
    WorldSize(2, 4, 8),
    DType("x", BF16, FP16),
    DType("weight", BF16),
    DType("normed", BF16),
    SameDType("x", "residual", "weight"),
    MultipleOf("x", -1, 8),
    MultipleOf("x", 0, 4),
    MultipleOf("weight", -1, 16),
    SizeBetween("x", -1, 64, 8192),
    SizeBetween("x", -2, 1, 128),
    SizeBetween("weight", 0, 64, 8192),
    Dimensions("x", 2, 3),
    Dimensions("weight", 1),
    Present("weight"),
    Contiguous("x"),
    Contiguous("weight"),
    LiveOutputs("normed", "residual_out"),
    Attribute("weight_bias", 0.0, 1.0),
    Attribute("norm_dtype", None),
    DTypeAttribute("norm_dtype", "x"),
    DTypeAttribute("norm_dtype", "x", (torch.float32,)),
    DTypeAttribute("norm_dtype", "weight"),
    Tokens(most=64),
    Tokens(least=3),
    Tokens(most=96, least=5, multiple_of=4),
    FixedTokens("x"),
    FixedTokens("weight"),
    KnownFaster("x", (("sm_90", 4, 0, 8 << 20), ("sm_90", 8, 1 << 20, 2 << 20), ("gfx942", 4, 0, 1 << 20)), "as said"),
    KnownFaster("x", (("sm_90", 2, 512, 1024), ("sm_90", 2, 2048, 4095))),
    KnownFaster("x", (("sm_90", 2, 0, 1),)),
    KnownFaster("residual", (("sm_90", 2, 0, 4096),)),
]
CLASSES = list(dict.fromkeys(type(requirement) for requirement in REQUIREMENTS))

OPPOSITE = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.Mod: ast.FloorDiv, ast.Mult: ast.Add,
}  # fmt: skip
NUMBERS = {"of", "low", "high", "dim"}
"""Fields that are off by one in some mutants."""

EQUIVALENT = {(SameDType, "1 to 0")}
"""Changes that change nothing: the first dtype compared with itself as well."""


def mutants(kind):
    """Each way to change one operator or number of ``unmet``, as (what was changed, the changed function)."""
    source = textwrap.dedent(inspect.getsource(kind.unmet))
    for index, found in enumerate(ast.walk(ast.parse(source))):
        for delta in (1, -1) if _may_change(found) else ():  # else most of the time would go into parsing
            tree = ast.parse(source)
            node = list(ast.walk(tree))[index]
            if (change := _mutate(tree, node, delta)) is None:
                continue
            scope = dict(vars(sys.modules[kind.__module__]))
            exec(compile(ast.fix_missing_locations(tree), f"<{kind.__name__}: {change}>", "exec"), scope)
            yield f"{change} in line {getattr(node, 'lineno', 0)}", scope["unmet"]


def _may_change(node):
    if isinstance(node, ast.Constant):
        return type(node.value) is int
    return isinstance(node, ast.Compare | ast.BoolOp | ast.BinOp) or getattr(node, "attr", None) in NUMBERS


def _mutate(tree, node, delta):
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and delta == 1:
        return _swap(node, "ops", 0)
    if isinstance(node, ast.Compare) and len(node.ops) == 2:
        return _swap(node, "ops", 0 if delta == 1 else 1)
    if isinstance(node, ast.BoolOp | ast.BinOp) and delta == 1:
        old = type(node.op)
        if old in OPPOSITE:
            node.op = OPPOSITE[old]()
            return f"{old.__name__} to {OPPOSITE[old].__name__}"
    if isinstance(node, ast.Attribute) and node.attr in NUMBERS and not _in_text(tree, node):
        _replace(tree, node, ast.BinOp(node, ast.Add() if delta == 1 else ast.Sub(), ast.Constant(1)))
        return f"{node.attr} {delta:+d}"
    if isinstance(node, ast.Constant) and type(node.value) is int and not _in_text(tree, node):
        node.value += delta
        return f"{node.value - delta} to {node.value}"
    return None


def _swap(node, field, index):
    old = type(getattr(node, field)[index])
    if old not in OPPOSITE:
        return None
    getattr(node, field)[index] = OPPOSITE[old]()
    return f"{old.__name__} to {OPPOSITE[old].__name__}"


def _in_text(tree, node):
    return any(node in ast.walk(text) for text in ast.walk(tree) if isinstance(text, ast.JoinedStr))


def _replace(tree, old, new):
    class Replace(ast.NodeTransformer):
        def visit(self, node):
            return new if node is old else self.generic_visit(node)

    Replace().visit(tree)


def caught(monkeypatch, *wrong):
    """The words by which the kit catches a strategy with these requirements."""
    declared = Strategy(
        pattern=all_reduce_add_rms_norm.name, name="mutant.one", impl=all_reduce_add_rms_norm.function, requires=wrong
    )
    module = ModuleType(f"mutant_{id(declared)}")
    module.plugin = SimpleNamespace(fusion_strategies=hookimpl(lambda: [declared]))
    module.keep = declared  # its address is in the name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (subject,) = subjects("mutant", f"{module.__name__}:plugin")
    CHECK.run(subject)


def changed(requirement, unmet):
    """The same requirement by a class whose guard is another."""
    kind = type(type(requirement).__name__, (type(requirement),), {"unmet": unmet})
    wrong = object.__new__(kind)
    for name, value in vars(requirement).items():
        object.__setattr__(wrong, name, value)
    return wrong


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_right_requirement_passes(requirement, monkeypatch):
    caught(monkeypatch, requirement)
    both = sides(requirement, _site())
    assert both.met
    assert both.unmet


def _site():
    from fusion_core.testing import example_site

    return example_site(all_reduce_add_rms_norm)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_requirement_that_is_always_met_is_caught(requirement, monkeypatch):
    with pytest.raises(CheckFailed, match="is not met here and does not refuse"):
        caught(monkeypatch, changed(requirement, lambda self, site: None))


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_requirement_that_is_never_met_is_caught(requirement, monkeypatch):
    with pytest.raises(CheckFailed, match="is met here and refuses: never"):
        caught(monkeypatch, changed(requirement, lambda self, site: Reason("never", "never")))


def _is_same(kind, change):
    return (kind, change.partition(" in line")[0]) in EQUIVALENT


MUTANTS = [(kind, change, unmet) for kind in CLASSES for change, unmet in mutants(kind) if not _is_same(kind, change)]


@pytest.mark.parametrize(("kind", "change", "unmet"), MUTANTS, ids=[f"{k.__name__}: {c}" for k, c, _ in MUTANTS])
def test_a_requirement_with_one_operator_or_number_changed_is_caught(kind, change, unmet, monkeypatch):
    survived = []
    for requirement in [each for each in REQUIREMENTS if type(each) is kind]:
        try:
            caught(monkeypatch, changed(requirement, unmet))
        except CheckFailed:
            return
        survived.append(str(requirement))
    pytest.fail(f"{kind.__name__}.unmet with {change} passes the kit for {survived}")


def test_every_requirement_of_core_is_among_them():
    of_core = [
        value
        for module in (requirements, size_requirements, known_faster, token_counts)
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__ and value is not requirements.Requirement
    ]
    assert set(of_core) == set(CLASSES)
    assert len(MUTANTS) > 50
