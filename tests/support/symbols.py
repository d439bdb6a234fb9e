"""Tensors of which a size is known only at run time."""

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fusion_core import TensorMeta


def symbolic(rows: int, hidden: int, which: int = 0) -> tuple[ShapeEnv, TensorMeta]:
    """A bfloat16 tensor of which one size is a real backed symbol, and its environment."""
    env = ShapeEnv()
    dynamic = [DimDynamic.STATIC, DimDynamic.STATIC]
    dynamic[which] = DimDynamic.DYNAMIC
    fake = FakeTensorMode(shape_env=env).from_tensor(
        torch.empty(rows, hidden, dtype=torch.bfloat16),
        symbolic_context=StatelessSymbolicContext(dynamic),
        source=ConstantSource("x"),
    )
    assert isinstance(fake.shape[which], torch.SymInt)
    return env, TensorMeta.of(fake)
