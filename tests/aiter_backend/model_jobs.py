"""What the workers of the model's tests run."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MODEL = Path(__file__).with_name("model")

_communicators: dict[int, Any] = {}


def load(arch: str | None) -> ModuleType:
    """The model for an architecture, as a fresh import unless it is there already."""
    if sys.modules.get("aiter") and os.environ.get("GPU_ARCHS") == arch:
        return sys.modules["aiter"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]
    _communicators.clear()
    os.environ.pop("GPU_ARCHS", None)
    if arch is not None:
        os.environ["GPU_ARCHS"] = arch
    if str(MODEL) not in sys.path:
        sys.path.insert(0, str(MODEL))
    import aiter.dist.device_communicators.custom_all_reduce

    return aiter


def module(arch: str = "gfx950") -> ModuleType:
    """Where `CustomAllreduce` lives."""
    return load(arch).dist.device_communicators.custom_all_reduce  # type: ignore[no-any-return]


def communicator(arch: str = "gfx950", max_size: int = 1 << 26) -> Any:
    """One over all ranks, kept from call to call."""
    home = module(arch)
    if max_size not in _communicators:
        _communicators[max_size] = home.CustomAllreduce(dist.group.WORLD, torch.device("cpu"), max_size)
    return _communicators[max_size]


def said(call: Callable[[], Any]) -> Any:
    """What a call gives, or what it raises as text."""
    try:
        return portable(call())
    except Exception as error:  # noqa: BLE001  # the tests compare its type as well
        return f"{type(error).__name__}: {error}"


def portable(value: Any) -> Any:
    """FP8 as bytes: its tensors cannot be pickled."""
    if isinstance(value, tuple):
        return tuple(portable(each) for each in value)
    return value.view(torch.uint8) if isinstance(value, Tensor) and value.dtype.itemsize == 1 else value


def call(arch: str, method: str, shards: list[Tensor], *others: Tensor, max_size: int = 1 << 26, **flags: Any) -> Any:
    """A method of the communicator, with each rank's own first argument."""
    own = communicator(arch, max_size)
    return said(lambda: getattr(own, method)(shards[dist.get_rank()], *others, **flags))


def import_alone(arch: str | None) -> str:
    """What importing the model says."""
    return said(lambda: load(arch).__name__)


def launch(world_size: int, m: int, n: int, **changes: Any) -> Any:
    """The kernel that a dispatcher chooses, or its refusal."""
    load("gfx950")
    from aiter._dispatch import Launch

    given = {"kind": "plain", "dtype": torch.bfloat16, "input_n": n, "out_n": n, "use_1stage": False, **changes}
    return said(Launch(m=m, n=n, world_size=world_size, **given).kernel)


def alone(rank: int, arch: str = "gfx950", patience: float = 1.0) -> str:
    """A kernel on one rank; the others do something else."""
    own = communicator(arch)
    from aiter import _exchange

    before, _exchange.PATIENCE = _exchange.PATIENCE, patience
    try:
        x, w = torch.ones(2, 512, dtype=torch.bfloat16), torch.ones(512, dtype=torch.bfloat16)
        return said(lambda: own.fused_ar_rms(x, x, w=w, eps=1e-6)) if dist.get_rank() == rank else "elsewhere"
    finally:
        _exchange.PATIENCE = before


def disagree(arch: str = "gfx950") -> list[str]:
    """Calls in which rank 1 differs: another row, another kernel, a refusal, and something that does not matter."""
    own, odd = communicator(arch), dist.get_rank() == 1
    x, w = torch.ones(2, 512, dtype=torch.bfloat16), torch.ones(512, dtype=torch.bfloat16)
    apart = torch.cat([w[:1], w])[1:]
    return [
        said(lambda: own.fused_ar_rms(x[: 1 if odd else 2], x, w=w, eps=1e-6)),
        said(lambda: own.fused_ar_rms(x, x, w=w, eps=1e-6, use_1stage=odd)),
        said(lambda: own.fused_ar_rms(x, x, w=apart if odd else w, eps=1e-6)),
        said(lambda: own.fused_ar_rms_per_group_quant(x, x, w=w, eps=1e-6, group_size=96 if odd else 128)),
        said(lambda: own.fused_ar_rms(x, x, w=w, eps=1e-6, post_per_token_quant=True, emit_bf16=odd)[1].dtype),
    ]


def odd_counts() -> list[str]:
    """A communicator after rank 1 has made one more than the others, and one after all have caught up."""
    home = module("gfx950")
    world = dist.group.WORLD
    home.IPCBufferPool._pool_seq += dist.get_rank()
    first = said(lambda: type(home.CustomAllreduce(world, torch.device("cpu"))).__name__)
    home.IPCBufferPool._pool_seq += 1 - dist.get_rank()
    return [first, said(lambda: type(home.CustomAllreduce(world, torch.device("cpu"))).__name__)]


def groups_refused() -> list[str]:
    """A group of NCCL's, and default stores of other types."""
    home = module("gfx950")
    world, found = dist.group.WORLD, []
    backend, store = dist.get_backend, dist.distributed_c10d._get_default_store
    try:
        dist.get_backend = lambda group=None: dist.Backend.NCCL
        found.append(said(lambda: home.CustomAllreduce(world, 0)))
        dist.get_backend = backend
        for other in (dist.HashStore(), dist.PrefixStore("a", dist.HashStore())):
            dist.distributed_c10d._get_default_store = lambda other=other: other
            found.append(said(lambda: home.CustomAllreduce(world, 0)))
    finally:
        dist.get_backend, dist.distributed_c10d._get_default_store = backend, store
    return found


def store_types() -> list[str]:
    """The types of the default group's store, from the outside in."""
    store, found = dist.distributed_c10d._get_default_store(), []
    while isinstance(store, dist.PrefixStore):
        found.append(type(store).__name__)
        store = store.underlying_store
    return [*found, type(store).__name__]


def odd_sizes() -> list[tuple[bool, bool, Any]]:
    """Groups of one and of three ranks: whether disabled, whether there is a pool, what the gated call gives."""
    home, found = module("gfx950"), []
    for size in (1, 3):
        group = dist.new_group(list(range(size)))
        if dist.get_rank() < size:
            own = home.CustomAllreduce(group, "cpu")
            x = torch.ones(2, 512)
            found.append((own.disabled, hasattr(own, "_pool"), own.custom_fused_ar_rms(x, x, x[0], 1e-6, True)))
            own.close()
    return found


def life() -> list[Any]:
    """A communicator's attributes, and what becomes of it when it is closed."""
    own = module("gfx950").CustomAllreduce(dist.group.WORLD, 0, 1 << 20)
    x = torch.ones(2, 512)
    before = [own.disabled, own.world_size, own.rank, own.max_size, own.fully_connected, bool(own._ptr)]
    before += [str(own.device), own._pool["input"].max_size]
    own.close()
    own.close()
    return [*before, own._ptr, own.should_custom_ar(x), said(lambda: own.fused_ar_rms(x, x, w=x[0], eps=1e-6))]


def warming_up(rank: int) -> tuple[Any, ...]:
    """The gated calls inside `capture`, on one rank alone: they wait for nobody."""
    own = communicator("gfx942")
    if dist.get_rank() != rank:
        return ()
    x = torch.ones(2, 512, dtype=torch.bfloat16)
    given = (x, x, x[0], 1e-6)
    with own.capture():
        results = (
            (own.custom_all_reduce(x),),
            own.custom_fused_ar_rms(*given, True),
            own.custom_fused_ar_rms_quant(*given, False, emit_bf16=True),
            own.custom_fused_ar_rms_per_group_quant(*given, transpose_scale=True),
            own.custom_fused_ar_rms_mxfp4_quant(*given),
        )
    assert not own._IS_CAPTURING
    return portable(results)


def captured(inside: bool) -> tuple[Tensor, ...]:
    """A call with ``registered=True`` on a capturing stream, inside of `capture` or not: what a replay would give."""
    own = communicator("gfx950")
    x = torch.ones(1, 512)
    before, torch.cuda.is_current_stream_capturing = torch.cuda.is_current_stream_capturing, lambda: True
    try:
        if not inside:
            return own.fused_ar_rms(x, x, w=x[0], eps=0.0, registered=True)
        with own.capture():
            return own.custom_fused_ar_rms(x, x, x[0], 0.0, True)
    finally:
        torch.cuda.is_current_stream_capturing = before


def gate(environment: dict[str, str], sizes: list[int], max_size: int = 1 << 30) -> list[tuple[bool, bool]]:
    """`should_custom_ar` of so many bytes, without and with ``prefill_support``, under these variables."""
    home = module("gfx950")
    os.environ |= environment
    try:
        own = home.CustomAllreduce(dist.group.WORLD, "cpu", max_size)
    finally:
        for name in environment:
            del os.environ[name]
    inputs = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    return [(own.should_custom_ar(x), own.should_custom_ar(x, True)) for x in inputs]


def recorded() -> list[dict[str, Any]]:
    """What the record holds after a few calls, one of them refused."""
    own = communicator("gfx950")
    calls = sys.modules["aiter"].calls
    calls.clear()
    x, w = torch.ones(2, 512, dtype=torch.bfloat16), torch.ones(512, dtype=torch.bfloat16)
    own.custom_fused_ar_rms(x, x, w, 1e-6, use_1stage=True)
    own.fused_ar_rms_per_group_quant(x, x, w=w, eps=1e-6, transpose_scale=True)
    said(lambda: own.fused_ar_rms_mxfp4_quant(x[:, :48], x, w=w, eps=1e-6))
    return list(calls)
