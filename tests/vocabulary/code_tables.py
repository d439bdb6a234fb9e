"""An oracle for small float formats that shares nothing with fusion_core: every code's value, and the nearest code.

Values are exact float64; the nearest is found by comparison with midpoints, which are exact too. Below it: the rows
that break quantisers, and the checks of traced and compiled code, for the tests beside this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


@dataclass(frozen=True)
class CodeTable:
    """A small float format as the list of its values.

    Attributes:
        magnitudes: The finite values of the non-negative codes, in the codes' order, which is ascending.
        sign: The sign bit.
        nan: The code for a NaN.
        signed_zero: Whether the sign bit alone means -0.0.
    """

    magnitudes: np.ndarray
    sign: int
    nan: int
    signed_zero: bool = True

    def values(self) -> np.ndarray:
        """The value of each of the ``2 * sign`` codes, NaN where there is none."""
        values = np.full(2 * self.sign, np.nan)
        count = len(self.magnitudes)
        values[:count] = self.magnitudes
        values[self.sign : self.sign + count] = -self.magnitudes
        if not self.signed_zero:
            values[self.sign] = np.nan
        return values

    def nearest(self, x: np.ndarray, ties: str = "even", largest: float = math.inf) -> np.ndarray:
        """The nearest code of each float64, saturating at ``largest`` or the table's end."""
        x = np.asarray(x, dtype=np.float64)
        magnitude = np.minimum(np.nan_to_num(np.abs(x), nan=0.0, posinf=math.inf), min(largest, self.magnitudes[-1]))
        midpoints = (self.magnitudes[:-1] + self.magnitudes[1:]) / 2
        low = np.searchsorted(midpoints, magnitude, side="left")  # a tie counts as below its midpoint
        high = np.searchsorted(midpoints, magnitude, side="right")  # a tie counts as above
        code = high if ties == "away" else np.where(low % 2 == 0, low, high)
        negative = np.signbit(x) & (self.signed_zero | (code != 0))
        return np.where(np.isnan(x), self.nan, code + self.sign * negative).astype(np.uint8)


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int, codes: int) -> np.ndarray:
    values = []
    for code in range(codes):
        exponent, mantissa = divmod(code, 1 << mantissa_bits)
        fraction = mantissa / (1 << mantissa_bits)
        values.append(math.ldexp(1 + fraction, exponent - bias) if exponent else math.ldexp(fraction, 1 - bias))
    assert codes <= 1 << (exponent_bits + mantissa_bits)
    return np.array(values)


# 0x7F is NaN, and so is 0xFF; there are no infinities
E4M3FN = CodeTable(_minifloat(4, 3, bias=7, codes=0x7F), sign=0x80, nan=0x7F)
# 0x80 is the only NaN, so there is no -0.0
E4M3FNUZ = CodeTable(_minifloat(4, 3, bias=8, codes=0x80), sign=0x80, nan=0x80, signed_zero=False)
# no NaN: hardware converts one to +6
E2M1 = CodeTable(_minifloat(2, 1, bias=1, codes=8), sign=8, nan=7)

TABLES = {torch.float8_e4m3fn: E4M3FN, torch.float8_e4m3fnuz: E4M3FNUZ}

Quantise = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]

KINDS = ("zero", "normal", "outlier", "huge", "tiny", "subnormal", "ties", "spread", "power", "equal")


def adversarial_row(kind: str, n: int, seed: int) -> np.ndarray:
    """A float32 row of the kind that breaks quantisers."""
    random = np.random.default_rng(seed)
    normal = random.standard_normal(n)
    if kind == "zero":
        row = np.where(random.random(n) < 0.5, 0.0, -0.0)
    elif kind == "outlier":
        row = normal * np.where(np.arange(n) == random.integers(n), 1e4, 1.0)
    elif kind == "huge":
        row = np.clip(normal, -3, 3) * 1e38
    elif kind == "tiny":
        row = normal * 1e-30
    elif kind == "subnormal":
        row = normal * 1e-41
    elif kind == "ties":  # with a power of two as scale, half of them lie half way between codes
        row = np.append(random.integers(-32, 33, n - 1) / 16, 448.0)
    elif kind == "spread":
        row = np.sign(normal) * np.exp2(random.uniform(-40, 40, n))
    elif kind == "power":
        row = np.sign(normal) * np.exp2(random.integers(-20, 20, n)) * random.choice([1, 1.25, 1.5, 1.75, 1.875], n)
    elif kind == "equal":
        row = np.full(n, normal[0])
    else:
        row = normal
    return row.astype(np.float32)


def adversarial_rows(tokens: int, n: int) -> np.ndarray:
    """That many rows, of every kind in turn."""
    rows = [adversarial_row(KINDS[token % len(KINDS)], n, token) for token in range(tokens)]
    return np.array(rows, np.float32).reshape(tokens, n)


def assert_same(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> None:
    """Refuse results that differ in dtype, shape, strides or any bit."""
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert not a.numel() or a.stride() == b.stride()
        a_bytes, b_bytes = (t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(a_bytes, b_bytes)


def assert_traces_once_for_all_token_counts(quantise: Quantise, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Trace with fake tensors and a symbolic token count; the graph must then be right for any other count."""
    shape_env = ShapeEnv()
    dynamic = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    with FakeTensorMode(shape_env=shape_env) as mode:
        fake = mode.from_tensor(x, symbolic_context=dynamic), mode.from_tensor(scale)
        graph = make_fx(quantise)(*fake)
    (tokens,) = fake[0].shape[0].node.expr.free_symbols
    for guard in shape_env.guards:
        for count in (2, 3, 4, 127, 128, 129, 1000):
            assert guard.expr.subs(tokens, count) == True, guard.expr  # noqa: E712 (sympy's true)
    for count in (0, 1, 2, 130):
        rows = torch.from_numpy(adversarial_rows(count, x.shape[1])).to(x.dtype)
        assert_same(graph(rows, scale), quantise(rows, scale))


def assert_compiles_once_for_all_token_counts(quantise: Quantise, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Compile with Inductor, nothing known of the token count; every count must give eager's bits."""
    torch._dynamo.reset()
    compiled = torch.compile(quantise, fullgraph=True)
    x = x.clone()
    torch._dynamo.decorators.mark_unbacked(x, 0)
    assert_same(compiled(x, scale), quantise(x, scale))
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (0, 1, 130):
            rows = torch.from_numpy(adversarial_rows(count, x.shape[1])).to(x.dtype)
            assert_same(compiled(rows, scale), quantise(rows, scale))
