"""Each requirement: the sites on both sides of it, the message, the statement, the key."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusion_core import (
    Arch,
    Attribute,
    Contiguous,
    Device,
    Dimensions,
    DType,
    DTypeAttribute,
    FixedTokens,
    KnownFaster,
    LiveOutputs,
    MultipleOf,
    OnDevice,
    Present,
    Requirement,
    SameDType,
    Site,
    SizeBetween,
    TensorMeta,
    Tokens,
    WorldSize,
)

BF16 = torch.bfloat16
TUNE = "fusion-core tune measures it on this machine"
SITE = Site(
    pattern="all_reduce_add_rms_norm",
    node="all_reduce",
    inputs={
        "x": TensorMeta((4, 64), BF16, (64, 1)),
        "residual": TensorMeta((4, 64), BF16, (64, 1)),
        "weight": TensorMeta((64,), BF16, (1,)),
    },
    outputs={"normed": TensorMeta((4, 64), BF16, (64, 1))},
    attributes={"eps": 1e-5, "weight_bias": 0.0},
    device=Device("cuda", "sm_90"),
    world_size=4,
)


def with_input(name: str, meta: TensorMeta) -> Site:
    return replace(SITE, inputs={**SITE.inputs, name: meta})


def with_x(shape: tuple[Any, ...], stride: tuple[int, ...] | None = None) -> Site:
    return with_input("x", TensorMeta(shape, BF16, stride))


# requirement, sites that meet it, (site that does not, its message), its statement
CASES: list[tuple[Requirement, list[Site], list[tuple[Site, str]], str]] = [
    (
        OnDevice("cuda"),
        [SITE],
        [(replace(SITE, device=Device("cpu")), "device is cpu, needs cuda")],
        "device cuda",
    ),
    (
        Arch("sm_90", "sm_100"),
        [SITE, replace(SITE, device=Device("cuda", "sm_100"))],
        [(replace(SITE, device=Device("cuda", "sm_89")), "device is cuda (sm_89), needs sm_90 or sm_100")],
        "architecture sm_90 or sm_100",
    ),
    (
        WorldSize(2, 4, 8),
        [SITE, replace(SITE, world_size=2), replace(SITE, world_size=8)],
        [
            (replace(SITE, world_size=3), "world size is 3, needs 2, 4 or 8"),
            (replace(SITE, world_size=1), "world size is 1, needs 2, 4 or 8"),
        ],
        "world size 2, 4 or 8",
    ),
    (
        DType("x", torch.bfloat16, torch.float16),
        [SITE, with_input("x", TensorMeta((4, 64), torch.float16))],
        [(with_input("x", TensorMeta((4, 64), torch.float64)), "x is float64, needs bfloat16 or float16")],
        "x in bfloat16 or float16",
    ),
    (
        DType("normed", torch.bfloat16),
        [SITE, replace(SITE, outputs={})],
        [
            (
                replace(SITE, outputs={"normed": TensorMeta((4, 64), torch.float32)}),
                "normed is float32, needs bfloat16",
            )
        ],
        "normed in bfloat16",
    ),
    (
        SameDType("x", "residual", "weight"),
        [SITE, replace(SITE, inputs={"x": SITE.inputs["x"]})],
        [
            (
                with_input("weight", TensorMeta((64,), torch.float32)),
                "weight is float32, needs bfloat16, the dtype of x",
            )
        ],
        "one dtype for x, residual, weight",
    ),
    (
        MultipleOf("x", dim=-1, of=8),
        [SITE, with_x((4, 8)), with_x((8,))],
        [
            (with_x((4, 20)), "x.shape[-1] is 20, needs a multiple of 8"),
            (with_x(()), "x has 0 dimensions, needs a dimension -1"),
        ],
        "x.shape[-1] a multiple of 8",
    ),
    (
        SizeBetween("x", dim=-1, low=64, high=8192),
        [SITE, with_x((4, 8192))],
        [
            (with_x((4, 63)), "x.shape[-1] is 63, needs 64 to 8192"),
            (with_x((4, 8193)), "x.shape[-1] is 8193, needs 64 to 8192"),
            (with_x(()), "x has 0 dimensions, needs a dimension -1"),
        ],
        "x.shape[-1] in 64 to 8192",
    ),
    (
        Dimensions("x", 2, 3),
        [SITE, with_x((1, 4, 64))],
        [
            (with_x((64,)), "x has 1 dimensions, needs 2 or 3"),
            (with_x((1, 1, 4, 64)), "x has 4 dimensions, needs 2 or 3"),
        ],
        "x with 2 or 3 dimensions",
    ),
    (
        Present("weight"),
        [SITE],
        [(replace(SITE, inputs={"x": SITE.inputs["x"]}), "there is no weight, needs one")],
        "weight present",
    ),
    (
        Contiguous("x"),
        [SITE, with_x((4, 1, 64), (64, 7, 1)), with_x((4, 64))],
        [
            (with_x((4, 64), (1, 4)), "x has strides (1, 4), needs a contiguous tensor"),
            (with_x((4, 64), (128, 1)), "x has strides (128, 1), needs a contiguous tensor"),
        ],
        "x contiguous",
    ),
    (
        LiveOutputs("normed", "residual_out"),
        [SITE, replace(SITE, outputs={})],
        [
            (
                replace(SITE, outputs={"reduced": SITE.inputs["x"]}),
                "reduced is used outside the site, needs no other live outputs than normed or residual_out",
            )
        ],
        "live outputs among normed, residual_out",
    ),
    (
        Attribute("weight_bias", 0.0),
        [SITE, replace(SITE, attributes={})],
        [(replace(SITE, attributes={"weight_bias": 1.0}), "weight_bias is 1.0, needs 0.0")],
        "weight_bias 0.0",
    ),
    (
        DTypeAttribute("norm_dtype", "x", (torch.float32,)),
        [SITE, *(replace(SITE, attributes={"norm_dtype": each}) for each in (None, torch.bfloat16, torch.float32))],
        [(replace(SITE, attributes={"norm_dtype": torch.float16}), "norm_dtype is float16, needs bfloat16 or float32")],
        "norm_dtype that of x or float32",
    ),
    (
        Tokens(most=9, least=4, multiple_of=2),
        [SITE, with_x((2, 3, 64)), with_x((8, 64))],
        [
            (with_x((2, 64)), "x has 2 tokens, needs 4 to 9 tokens, in multiples of 2"),
            (with_x((10, 64)), "x has 10 tokens, needs 4 to 9 tokens, in multiples of 2"),
            (with_x((1, 5, 64)), "x has 5 tokens, needs 4 to 9 tokens, in multiples of 2"),
            (with_x((64,)), "x has 1 token, needs 4 to 9 tokens, in multiples of 2"),
        ],
        "4 to 9 tokens, in multiples of 2",
    ),
    (
        FixedTokens("x"),
        [SITE, with_x(())],
        [
            (
                with_x((ShapeEnv().create_unbacked_symint(), 64)),
                "x has the run-time size u0, needs fixed sizes: above the kernel's capacity its operator is slower than "
                "what Inductor compiles; torch.compile(dynamic=False)",
            )
        ],
        "fixed sizes of x",
    ),
    (
        KnownFaster("x", (("sm_90", 4, 0, 1 << 20), ("sm_90", 4, 4 << 20, 8 << 20), ("sm_90", 8, 2 << 20, 4 << 20))),
        [
            SITE,
            with_x((0, 64)),
            with_x((1 << 13, 64)),
            with_x(((4 << 20) // 2 + 1,)),
            with_x((1 << 16, 64)),
            with_x((ShapeEnv().create_unbacked_symint(), 64)),
            replace(with_x((1 << 14, 80)), world_size=8),
        ],
        [
            (
                with_x(((1 << 13) + 1, 64)),
                "x has 1 MiB on 4 ranks of cuda (sm_90), needs over 0 up to 1 MiB or over 4 up to 8 MiB; " + TUNE,
            ),
            (
                with_x((1 << 15, 64)),
                "x has 4 MiB on 4 ranks of cuda (sm_90), needs over 0 up to 1 MiB or over 4 up to 8 MiB; " + TUNE,
            ),
            (
                with_x((1 << 17, 64)),
                "x has 16 MiB on 4 ranks of cuda (sm_90), needs over 0 up to 1 MiB or over 4 up to 8 MiB; " + TUNE,
            ),
            (
                replace(with_x((0, 64)), world_size=8),
                "x has 0 MiB on 8 ranks of cuda (sm_90), needs over 2 up to 4 MiB; " + TUNE,
            ),
            (
                replace(SITE, world_size=2),
                "nobody has measured it to be faster on 2 ranks of cuda (sm_90), needs a measurement; " + TUNE,
            ),
            (
                replace(SITE, device=Device("cuda", "gfx942")),
                "nobody has measured it to be faster on 4 ranks of cuda (gfx942), needs a measurement; " + TUNE,
            ),
            (
                replace(with_x((ShapeEnv().create_unbacked_symint(), 64)), world_size=2),
                "nobody has measured it to be faster on 2 ranks of cuda (sm_90), needs a measurement; " + TUNE,
            ),
        ],
        "an input size of x at which it is known to be faster",
    ),
    (
        KnownFaster("residual", (("sm_90", 4, 0, 512),), "as Acme has it"),
        [SITE, replace(SITE, inputs={"x": SITE.inputs["x"]})],
        [
            (
                with_input("residual", TensorMeta((5, 64), BF16)),
                "residual has 0.00061 MiB on 4 ranks of cuda (sm_90), needs over 0 up to 0.000488281 MiB, as Acme has "
                "it; " + TUNE,
            )
        ],
        "an input size of residual at which it is known to be faster",
    ),
    (
        KnownFaster("x"),
        [],
        [(SITE, "nobody has measured it to be faster on 4 ranks of cuda (sm_90), needs a measurement; " + TUNE)],
        "an input size of x at which it is known to be faster",
    ),
]
IDS = [str(case[0]) for case in CASES]


@pytest.mark.parametrize(("requirement", "met", "unmet", "statement"), CASES, ids=IDS)
def test_both_sides_of_a_requirement(
    requirement: Requirement, met: list[Site], unmet: list[tuple[Site, str]], statement: str
) -> None:
    assert [requirement.unmet(site) for site in met] == [None] * len(met)
    for site, message in unmet:
        reason = requirement.unmet(site)
        assert reason is not None
        assert str(reason) == message
        assert reason.code
    assert str(requirement) == statement


@pytest.mark.parametrize("requirement", [case[0] for case in CASES], ids=IDS)
def test_a_requirement_is_a_key_that_tells_two_apart(requirement: Requirement) -> None:
    assert isinstance(requirement, Requirement)
    assert hash(requirement) == hash(eval(repr(requirement), _names()))
    assert "0x" not in repr(requirement)
    assert repr(requirement) != repr(DType("x", torch.int8))


def _names() -> dict[str, Any]:
    def rebuilt(kind: type) -> Any:
        def build(**fields: Any) -> Any:
            made = object.__new__(kind)
            for name, value in fields.items():
                object.__setattr__(made, name, value)
            return made

        return build

    kinds = [type(case[0]) for case in CASES]
    return {kind.__name__: rebuilt(kind) for kind in kinds} | {"torch": torch}


def test_a_size_known_only_at_run_time_is_refused_and_adds_no_guard() -> None:
    shapes = ShapeEnv()
    with_hint = shapes.create_unspecified_symint_and_symbol(
        64, _source("s"), torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC
    )
    without = shapes.create_unbacked_symint()
    for size in (with_hint, without):
        for requirement in (MultipleOf("x", dim=0, of=8), SizeBetween("x", dim=0, low=1, high=64)):
            reason = requirement.unmet(with_x((size, 64)))
            assert reason is not None
            assert "known only at run time, needs" in str(reason)
        assert MultipleOf("x", dim=0, of=8).unmet(with_x((size * 16, 64))) is None  # whatever the size
        assert Contiguous("x").unmet(with_x((2, size, 64), (1, 1, 1))) is not None
        assert Contiguous("x").unmet(with_x((2, size, 64), (size * 64, 64, 1))) is None
    assert not shapes.guards


def _source(name: str) -> Any:
    from torch._dynamo.source import ConstantSource

    return ConstantSource(name)
