"""Operators whose schema follows from a pattern."""

import pytest
import torch

from fusion_core import PatternError
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.patterns.definition import pattern
from fusion_core.vocabulary import all_reduce
from fusion_core.workspaces import register_operator

LIBRARY = torch.library.Library("fusion_core_test_operator", "DEF")
PATTERNS = {each.name: each for each in CORE_PATTERNS}


def registered(name, operator_name, run=None, **given):
    seen = []

    def note(**arguments):
        seen.append(arguments)
        return torch.empty(0), torch.empty(0)

    fake = run or note
    return register_operator(LIBRARY, PATTERNS[name], run or note, fake, name=operator_name, **given), seen


def test_the_schema_has_the_pattern_s_tensors_scalars_and_outputs():
    operator, _ = registered("all_reduce_add_rms_norm_group_fp8", "whole")
    assert str(operator._schema) == (
        "fusion_core_test_operator::whole(Tensor x, Tensor residual, Tensor weight, float eps, float weight_bias, "
        "ScalarType? residual_dtype, ScalarType? norm_dtype, int group_size, ScalarType fp8_dtype, float? fp8_max, "
        "float? min_scale, str scale_format, str scale_layout, str group) -> "
        "(Tensor quantized, Tensor scale, Tensor normed, Tensor residual_out, Tensor reduced)"
    )


def test_what_it_takes_and_gives_can_be_chosen_and_run_gets_it_by_name():
    operator, seen = registered(
        "all_reduce_rms_norm", "chosen", scalars=("eps",), optional=("weight",), outputs=("normed", "reduced"),
        options=("int? max_tokens=None", "bool pdl=False"),
    )  # fmt: skip
    assert [each.name for each in operator._schema.arguments] == ["x", "weight", "eps", "group", "max_tokens", "pdl"]
    x, weight = torch.ones(2, 3), torch.ones(3)
    operator(x, weight, 1e-5, "tp", pdl=True)
    operator(x, None, 1e-5, "tp")
    assert seen == [
        {"x": x, "weight": weight, "eps": 1e-5, "group": "tp", "max_tokens": None, "pdl": True},
        {"x": x, "weight": None, "eps": 1e-5, "group": "tp"},
    ]


def test_it_has_a_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    operator, _ = registered("all_reduce", "faked", lambda x, group: x.new_empty(x.shape))
    with FakeTensorMode():
        found = operator(torch.empty(3, 2, 64, dtype=torch.bfloat16), "no group")
    assert (found.shape, found.dtype) == ((3, 2, 64), torch.bfloat16)


def test_a_scalar_that_no_schema_has_a_type_for():
    @pattern(outputs=("reduced",))
    def odd(x: torch.Tensor, how: complex, *, group: str) -> torch.Tensor:
        return all_reduce(x, group)

    with pytest.raises(PatternError, match=r"how of pattern 'odd' is <class 'complex'>, needs one of bool, int, float"):
        register_operator(LIBRARY, odd, print, print)
