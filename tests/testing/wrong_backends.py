"""Backends of one strategy each, wrong in one way each. Workers import it: no test library.

Each is the value of an entry point: ``EntryPoint("wrong", "tests.testing.wrong_backends:forgets_residual", ...)``.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fusion_core import (
    MultipleOf,
    SizeBetween,
    Tokens,
    pattern,
)
from fusion_core.vocabulary import add, all_reduce, rms_norm
from tests.testing.one_strategy import PATTERN, Results, backend, before, behind, definition, operator
from tests.testing.wrong_requirements import AnyDType, Never, Silent, Strange
from tests.testing.wrong_workspaces import own_part_alone

# Nothing is wrong with the first: it shows that what catches the others is what is wrong with them.

fine = backend(behind(lambda given, *results: results))
fine_if_switched_on = backend(behind(lambda given, *results: results), option="switch")
does_nothing = backend(behind(lambda given, *results: tuple(map(torch.zeros_like, results))))
has_an_epsilon_of_its_own = backend(before(lambda given: {"eps": 1e-6}))
forgets_weight_bias = backend(before(lambda given: {"weight_bias": 0.0}))
forgets_residual = backend(before(lambda given: {"residual": torch.zeros_like(given.residual)}))
rounds_the_residual = backend(
    before(lambda given: {"residual": given.residual.to(given.x.dtype).to(given.residual.dtype)})
)
swaps_outputs = backend(
    behind(lambda given, normed, summed, reduced: (summed.to(normed.dtype), normed.to(summed.dtype), reduced))
)
lets_a_bad_row_spread = backend(behind(lambda given, normed, *others: (normed + 0 * normed.sum(), *others)))


@backend
def returns_too_little(x, residual, weight, eps, *, group):
    return PATTERN.function(x, residual, weight, eps, group=group)[0]


@backend
def gives_another_dtype(x, residual, weight, eps, *, group):
    normed, *others = PATTERN.function(x, residual, weight, eps, group=group)
    return (normed.double(), *others)


def _sum_in_bf16(given: Any, normed: Tensor, summed: Tensor, reduced: Tensor) -> Results:
    members = dist.distributed_c10d._resolve_process_group(given.group)
    parts = [torch.empty_like(reduced) for _ in range(members.size())]
    dist.all_gather(parts, given.x.contiguous(), group=members)
    total = torch.zeros(reduced.shape, dtype=torch.bfloat16)
    for part in parts:
        total += part.to(torch.bfloat16)
    reduced = total.to(reduced.dtype)
    summed = add(reduced, given.residual, dtype=summed.dtype)
    return rms_norm(summed, given.weight, given.eps, weight_bias=given.weight_bias, dtype=normed.dtype), summed, reduced


sums_in_bf16 = backend(behind(_sum_in_bf16))


def _in_place(given: Any, normed: Tensor, summed: Tensor, reduced: Tensor) -> Results:
    given.residual.copy_(summed)
    return normed, summed, reduced


mutates_an_input = backend(behind(_in_place))


def _in_the_gaps(given: Any, *results: Tensor) -> Results:
    if given.x.numel() and not given.x.is_contiguous():
        torch.empty(0, dtype=given.x.dtype).set_(given.x.untyped_storage()).nan_to_num_(7.0)
    return results


writes_into_the_gaps = backend(behind(_in_the_gaps))


accepts_everything = backend(PATTERN.function, requires=(AnyDType("x", torch.bfloat16),))
refuses_everything = backend(PATTERN.function, requires=(Never("x", torch.bfloat16),))
refuses_without_a_word = backend(PATTERN.function, requires=(Silent("x", torch.bfloat16),))
contradicts_itself = backend(PATTERN.function, requires=(MultipleOf("x", -1, 8), SizeBetween("x", -1, 1, 7)))
has_a_strange_requirement = backend(PATTERN.function, requires=(Strange(),))


def _as_if_contiguous(given: Any) -> dict[str, Tensor]:
    memory = torch.empty(0, dtype=given.x.dtype).set_(given.x.untyped_storage())
    return {"x": memory[: given.x.numel()].view(given.x.shape)}


def _in_vectors(given: Any) -> dict[str, Tensor]:
    if given.x.shape[-1] % 8:
        raise RuntimeError("this kernel needs a multiple of 8")
    return {}


accepts_any_stride = backend(before(_as_if_contiguous))
accepts_any_size = backend(before(_in_vectors))
takes_four_dimensions_for_three = backend(
    behind(lambda given, *results: tuple(each * (2 if each.dim() == 4 else 1) for each in results))
)
has_a_row_where_there_is_none = backend(
    behind(
        lambda given, *results: (
            results if given.x.numel() else tuple(each.new_zeros(1, each.shape[-1]) for each in results)
        )
    )
)


def _by_rank(given: Any, normed: Tensor, *others: Tensor) -> Results:
    normed = normed.clone(memory_format=torch.contiguous_format)
    if dist.get_rank() == 1:
        first = normed.view(-1)[:1]  # a last bit, well within any tolerance
        first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
    return (normed, *others)


differs_between_ranks = backend(behind(_by_rank))


def _wrong_where(condition: Callable[[Any], bool]) -> Callable[..., Results]:
    def change(given: Any, normed: Tensor, *others: Tensor) -> Results:
        if given.x.numel() and condition(given):
            normed = normed.clone(memory_format=torch.contiguous_format)
            normed[-1] *= 2
        return (normed, *others)

    return behind(change)


def _rows(given: Any) -> int:
    return int(given.x.numel() // given.x.shape[-1])


is_wrong_beyond_1024_rows = backend(_wrong_where(lambda given: _rows(given) > 1024))
is_wrong_at_its_most_tokens = backend(_wrong_where(lambda given: _rows(given) == 700), requires=(Tokens(most=700),))
is_wrong_at_its_widest = backend(
    _wrong_where(lambda given: given.x.shape[-1] == 5120), requires=(SizeBetween("x", -1, 8, 5120),)
)
is_wrong_at_hidden_16384 = backend(_wrong_where(lambda given: given.x.shape[-1] == 16384))
is_wrong_at_four_ranks = backend(_wrong_where(lambda given: dist.get_world_size() == 4))


def _own_part_first(given: Any, normed: Tensor, summed: Tensor, reduced: Tensor) -> Results:
    members = dist.distributed_c10d._resolve_process_group(given.group)
    parts = [torch.empty(reduced.shape, dtype=reduced.dtype) for _ in range(members.size())]
    dist.all_gather(parts, given.x.contiguous(), group=members)
    first = members.rank()
    total = sum(part.float() for part in (*parts[first:], *parts[:first]))
    reduced = total.to(reduced.dtype)
    summed = add(reduced, given.residual, dtype=summed.dtype)
    return rms_norm(summed, given.weight, given.eps, weight_bias=given.weight_bias, dtype=normed.dtype), summed, reduced


adds_its_own_part_first = backend(behind(_own_part_first))


def _by_batch(given: Any, normed: Tensor, *others: Tensor) -> Results:
    if given.x.shape[0] > 64:
        normed = normed.clone(memory_format=torch.contiguous_format)
        first = normed.view(-1)[:1]  # a last bit, well within any tolerance
        first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
    return (normed, *others)


differs_between_batches = backend(behind(_by_batch), batch_invariant=True)


def _with_a_write(x, residual, weight, eps, group) -> Results:
    results = definition(x, residual, weight, eps, group)
    residual.add_(1)
    return results


def _sparse(each: Tensor) -> Tensor:
    return torch.empty_strided(each.shape, [2 * step for step in each.stride()], dtype=each.dtype)


fine_operator = backend(operator("fine", definition, lambda *outputs: outputs))


@torch.library.custom_op("fusion_wrong::setting", mutates_args=())
def _takes_a_setting(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, group: str, max_tokens: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return definition(x, residual, weight, eps, group)


@_takes_a_setting.register_fake
def _(x, residual, weight, eps, group, max_tokens):
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return summed, summed.clone(), x.new_empty(x.shape)


takes_a_setting = backend(_takes_a_setting)
lies_about_dtypes = backend(
    operator("dtypes", definition, lambda normed, summed, reduced: (normed.double(), summed, reduced))
)
lies_about_shapes = backend(
    operator("shapes", definition, lambda normed, summed, reduced: (normed.flatten(), summed, reduced))
)
lies_about_strides = backend(
    operator("strides", definition, lambda normed, summed, reduced: (_sparse(normed), summed, reduced))
)
hides_a_write = backend(operator("write", _with_a_write, lambda *outputs: outputs))


@backend
def has_no_fake(x, residual, weight, eps, *, group):
    if isinstance(x, FakeTensor):
        raise NotImplementedError("this kernel has no fake")
    return PATTERN.function(x, residual, weight, eps, group=group)


_HELD = torch.ones(1)


@backend
def holds_a_tensor(x, residual, weight, eps, *, group):
    normed, *others = PATTERN.function(x, residual, weight, eps, group=group)
    return (normed * _HELD.to(normed.dtype), *others)


_WORKSPACE: dict[Any, Tensor] = {}


def _reused(given: Any, normed: Tensor, *others: Tensor) -> Results:
    held = _WORKSPACE.setdefault((normed.shape, normed.dtype), torch.empty_like(normed))
    return (held.copy_(normed), *others)


returns_its_workspace = backend(behind(_reused))
returns_an_input = backend(
    behind(lambda given, normed, summed, reduced: (normed, given.residual.copy_(summed), reduced))
)
knows_one_group = backend(
    behind(
        lambda given, *results: (
            results if given.group == dist.group.WORLD.group_name else tuple(each * 2 for each in results)
        )
    )
)


def _die(given: Any) -> dict[str, Any]:
    if dist.get_rank() == 1:
        os._exit(7)
    return {}


forgets_the_sum_without_a_workspace = backend(before(own_part_alone))
dies_on_one_rank = backend(before(_die))


@pattern(outputs=("normed", "reduced"))
def all_reduce_shifted_rms_norm(x: Tensor, shift: Tensor, *, group: str) -> tuple[Tensor, Tensor]:
    """A stranger's pattern, with a tensor that the kit cannot make up."""
    reduced = all_reduce(x, group)
    return rms_norm(reduced, shift, 1e-6), reduced


has_a_pattern_without_example = backend(all_reduce_shifted_rms_norm.function, all_reduce_shifted_rms_norm)
