"""What the examples are drawn from."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st

from fusion_core.patterns import CORE_PATTERNS
from tests.properties.cases import LAYER_SPELLINGS, SPELLINGS, Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUES = ("normal", "zeros", "zero row", "huge row", "spike", "tiny", "small")
OUTPUTS = {pattern.name: pattern.outputs for pattern in CORE_PATTERNS}
PLAIN = ("all_reduce", "all_reduce_rms_norm", "all_reduce_add_rms_norm")
LAYER = ("all_reduce_layer_norm", "all_reduce_add_layer_norm")
QUANTIZED = tuple(name for name in OUTPUTS if "quantized" in OUTPUTS[name])

hidden_sizes = st.sampled_from((8, 1, 3, 20, 64, 100))
# of three numbers two or all may be close to their mean: what is left of them in float32 is chance, with any kernel
centred_sizes = st.sampled_from((8, 1, 20, 64, 100))
epsilons = st.floats(math.log(1e-12), math.log(1e-1)).map(math.exp)
leading_sizes = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def shapes(draw: st.DrawFn, hidden: st.SearchStrategy[int] = hidden_sizes) -> tuple[int, ...]:
    """One to four dimensions, the last of them a hidden size; zero rows as well."""
    return (*draw(leading_sizes), draw(hidden))


@st.composite
def cases(
    draw: st.DrawFn,
    pattern: st.SearchStrategy[str] = st.sampled_from(PLAIN),  # noqa: B008  # strategies are values
    hidden: st.SearchStrategy[int] = hidden_sizes,
    world_sizes: tuple[int, ...] = (1, 2, 3),
) -> Case:
    """A place in a model, as a user would write it."""
    name = draw(pattern)
    shape = draw(shapes(hidden))
    layout = draw(st.sampled_from(("contiguous", "transposed", "sliced")))
    dtype = draw(st.sampled_from(DTYPES))
    norm = "layer_norm" if "layer_norm" in name else "rms_norm" if "rms_norm" in name else None
    weight = draw(st.sampled_from(("same", "float32", "none") if norm else ("same", "float32")))
    outputs = OUTPUTS[name]
    live = draw(st.sets(st.sampled_from(outputs), min_size=1))
    # torch's own functions take a weight of the input's own dtype only
    spellings = [
        spelling
        for spelling in (LAYER_SPELLINGS if norm == "layer_norm" else SPELLINGS)
        if spelling not in ("functional", "torchs_own") or weight != "float32"
    ]
    return Case(
        pattern=name,
        shape=shape,
        dtype=dtype,
        residual_dtype=draw(st.sampled_from((dtype, torch.float32))),
        layout=layout,
        eps=draw(epsilons),
        weight=weight,
        weight_bias=0.0 if weight == "none" else draw(st.sampled_from((0.0, 1.0, 0.5, -0.25))),
        spelling=draw(st.sampled_from(spellings)),
        residual_first=draw(st.booleans()),
        flattened=len(shape) > 1 and draw(st.booleans()),
        in_place=draw(st.booleans()),
        live=tuple(each for each in outputs if each in live),
        values=draw(st.sampled_from(VALUES)),
        # a place that changes shape beside an empty dimension is refused where a size is symbolic: a test of its own
        dynamic=len(shape) > 1 and shape[0] > 1 and 0 not in shape and draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        world_size=draw(st.sampled_from(world_sizes)),
        bias=norm == "layer_norm" and draw(st.booleans()),
    )


def centred(**differing: Any) -> st.SearchStrategy[Case]:
    """Places with a LayerNorm, or with a bias alone."""
    return st.one_of(
        cases(st.sampled_from(LAYER), centred_sizes, **differing),
        cases(st.just("all_reduce_bias"), **differing),
    )


@st.composite
def options(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """The scalars of a quantised pattern beyond those of every norm."""
    if name.endswith("_nvfp4"):
        return {"scale_layout": draw(st.sampled_from(("swizzled_128x4", "linear")))}
    if name.endswith("_mxfp4"):
        return {
            "scale_rounding": draw(st.sampled_from(("even", "floor", "up"))),
            "ties": draw(st.sampled_from(("even", "away"))),
        }
    if name.endswith("_group_fp8"):
        return {
            "group_size": draw(st.sampled_from((8, 16, 32))),
            "scale_format": draw(st.sampled_from(("float32", "ue8m0", "ue8m0_packed"))),
            "scale_layout": draw(st.sampled_from(("row_major", "column_major"))),
        }
    return {"min_scale": draw(st.sampled_from((None, 0.0)))} if name.endswith("_token_fp8") else {}


@st.composite
def quantized(draw: st.DrawFn) -> tuple[Case, dict[str, Any]]:
    """A quantised pattern and its scalars. Spelling and live outputs are without meaning for an eager function."""
    case = draw(cases(st.sampled_from(QUANTIZED), st.sampled_from((32, 64, 96))))
    return case, draw(options(case.pattern))
