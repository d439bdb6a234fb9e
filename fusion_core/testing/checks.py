"""The promises of a strategy as plain functions: the conformance kit without a test runner.

Each of `CHECKS` has a ``name``, a ``title`` and ``run(subject)``, which returns None if the promise is kept and raises
otherwise::

    for subject in subjects("acme"):            # BackendError if the backend does not load
        for check in CHECKS:
            try:
                check.run(subject)
            except CheckSkipped as skipped:     # not on this machine, or not for this strategy; str() is the reason
                ...
            except CheckFailed as failed:       # str() names the strategy, site, rank, what was found and needed
                ...

`fusion_core.testing.conformance` makes each a pytest test, `fusion-core verify` a line of output. Generated examples
come from hypothesis under its current profile; workers start when first needed and stay alive.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from fusion_core._torch.tensors import FakeTensorMode
from fusion_core.errors import PatternError
from fusion_core.reason import Reason
from fusion_core.samples.layouts import LAYOUTS, strides
from fusion_core.samples.requirement_sides import NoSides, sides
from fusion_core.samples.sites import example_site, output_metas, resized, with_layout
from fusion_core.samples.tensors import Values
from fusion_core.site import Device, Site, TensorMeta
from fusion_core.testing import compiled, jobs, pools
from fusion_core.testing.check import CHECKS as _CHECKS
from fusion_core.testing.check import Check, Example, check, chosen
from fusion_core.testing.checking import (
    CheckFailed,
    CheckNotApplicable,
    CheckSkipped,
    asked,
    compare,
    compare_each,
    example,
    examples,
    fail,
    for_all,
    here,
    in_float32,
    judge,
    refused,
    run,
    sites,
)
from fusion_core.testing.drawing import draw_site
from fusion_core.testing.subject import Subject

__all__ = ["CHECKS", "Check", "CheckFailed", "CheckNotApplicable", "CheckSkipped"]

BATCHES = (1, 2, 3, 17, 64, 257)
"""Batch sizes in rows at which a batch-invariant strategy is compared."""

CPU = Device("cpu")
"""The device of the first example in checks that need no device."""


@check(needs_device=False)
def accepts_its_own_example(subject: Subject) -> None:
    """The strategy can run some ordinary site."""
    site = example(subject, CPU)
    if reasons := subject.strategy.cannot(site, subject.pattern):
        fail(subject, site, f"it refuses its own example: {'; '.join(map(str, reasons))}")


@check(needs_device=False)
def refuses_on_the_wrong_side_of_each_requirement(subject: Subject) -> None:
    """Each requirement is met just inside its bounds, and refuses with a reason just outside."""
    strategy, pattern = subject.strategy, subject.pattern
    try:
        site = example_site(pattern)
    except PatternError as error:
        raise CheckFailed(f"{subject}: {error}") from None
    with contextlib.suppress(CheckFailed):  # a strategy that accepts nothing still has requirements to check
        site = example(subject, CPU)
    for requirement in (*subject.requirements, *strategy.worthwhile):
        try:
            both = sides(requirement, site)
        except NoSides as error:
            raise CheckFailed(f"{subject}: {error}") from None
        for variant in both.met:
            if (reason := asked(subject, requirement, variant)) is not None:
                fail(subject, variant, f"requirement '{requirement}' is met here and refuses: {reason}")
        refused = strategy.should_not if requirement in strategy.worthwhile else lambda s: strategy.cannot(s, pattern)
        for variant in both.unmet:
            reason = asked(subject, requirement, variant)
            if reason is None:
                fail(subject, variant, f"requirement '{requirement}' is not met here and does not refuse")
            if not isinstance(reason, Reason) or not (reason.code and reason.found):
                found = f"requirement '{requirement}' refuses by {reason!r}, needs a Reason with code and found"
                fail(subject, variant, found)
            if reason not in refused(variant):
                fail(subject, variant, f"requirement '{requirement}' refuses, and the strategy does not: {reason}")


@contextlib.contextmanager
def _some_group() -> Iterator[str]:
    """The name of a process group of this process, of one rank if there is none: a strategy may ask for its size."""
    if dist.is_initialized():
        yield dist.group.WORLD.group_name  # type: ignore[union-attr]
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield dist.group.WORLD.group_name  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()


@check(needs_device=False)
def declares_what_the_definition_gives(subject: Subject) -> None:
    """On fake tensors its outputs have the definition's shapes and dtypes."""
    strategy, pattern = subject.strategy, subject.pattern

    def faked(site: Site, group: str) -> None:
        if strategy.cannot(site, pattern):
            return
        mode = FakeTensorMode()
        with torch.no_grad(), mode:
            fakes = {
                name: torch.empty_strided(meta.shape, meta.stride or strides(meta.shape), dtype=meta.dtype)
                for name, meta in site.inputs.items()
            }
            try:
                results, problems = jobs.by_name(strategy, pattern, jobs.call(strategy, pattern, site, fakes, group))
            except Exception as error:  # noqa: BLE001  # from a plugin's code
                found = f"it raises on fake tensors: {type(error).__name__}: {error}; needs a fake (register_fake)"
                fail(subject, site, found)
        defined = output_metas(pattern, tuple(site.inputs.items()), tuple(site.attributes.items()))
        assert not isinstance(defined, str)
        for name in [name for name in site.outputs if name in results]:
            meta, needs = TensorMeta.of(results[name]), defined[name]
            if (meta.shape, meta.dtype) != (needs.shape, needs.dtype):
                problems.append(f"the fake gives {name} as {meta}, needs {needs}")
        if problems:
            fail(subject, site, "; ".join(problems))

    with _some_group() as group:
        for site, _ in chosen([(example(subject, CPU), None)]):
            faked(site, group)
        for_all(subject, lambda site: faked(site, group), draw_site(pattern, strategy, accepted=True), factor=0.1)


@check(needs_device=True)
def equals_the_oracle_where_it_accepts(subject: Subject) -> None:
    """At each site its outputs are as close to the float64 oracle as the definition's, or it refuses with reasons."""
    device, sizes = here(subject)

    compare_each(subject, [(example(subject, device, sizes[0]), Values())])
    for_all(subject, functools.partial(compare, subject), examples(subject, device, sizes), factor=2.0)


@check(needs_device=True)
def leaves_its_inputs_alone(subject: Subject) -> None:
    """It writes to no input, nor to the gaps between an input's elements, unless its operator's schema declares it."""
    device, sizes = here(subject)
    declared = jobs.written(subject.strategy.impl)

    def unchanged(drawn: Example) -> None:
        site, values = drawn
        if refused(subject, site):
            return
        for rank, outcome in enumerate(run(subject, site, jobs.compare, values)):
            if changed := [name for name in outcome.changed if name not in declared]:
                found = f"it writes into {', '.join(changed)}, needs to leave it as it is, or to declare mutates_args"
                fail(subject, site, found, rank, values)

    plain = example(subject, device, sizes[0])
    for one in chosen((with_layout(subject.pattern, plain, layout), Values()) for layout in LAYOUTS):
        unchanged(one)
    for_all(subject, unchanged, examples(subject, device, sizes[:1]), factor=0.1)


@check(needs_device=True)
def fake_matches_real(subject: Subject) -> None:
    """Its fake returns the shapes, dtypes and strides of the real results, and `torch.library.opcheck` passes."""
    device, sizes = here(subject)

    def same(site: Site) -> None:
        if refused(subject, site):
            return
        for rank, problems in enumerate(run(subject, site, jobs.fakes_and_results, Values())):
            if problems:
                fail(subject, site, "; ".join(problems), rank)

    for site, _ in chosen([(example(subject, device, sizes[0]), None)]):
        same(site)
    for_all(subject, same, sites(subject, device, sizes[:1], accepted=True), factor=0.05)


@check(needs_device=True)
def stands_in_the_compiled_graph(subject: Subject) -> None:
    """torch.compile puts it where its pattern matches, and the results stay correct."""
    device, sizes = here(subject)
    ((site, _),) = chosen([(example(subject, device, sizes[0]), None)])
    by_rank = run(subject, site, compiled.compile_it, Values())
    for rank, found in enumerate(by_rank):
        report = found.site
        if report is None:
            fail(subject, site, "the compiled graph has no all_reduce", rank)
        if report.strategy != subject.name:
            decision = next((each for each in report.decisions if each.strategy == subject.name), None)
            because = "; ".join(map(str, decision.reasons)) if decision is not None else "it was not asked"
            if decision is not None and decision.stage.name == "STRUCTURE":
                raise CheckNotApplicable(f"fusion_core does not find {site.pattern} in compiled graphs yet: {because}")
            fail(subject, site, f"it is not in the compiled graph: {because}", rank)
        operator = jobs.operator_name(subject.strategy.impl)
        if not found.targets or (operator and not any(target.startswith(operator) for target in found.targets)):
            fail(subject, site, f"the compiled graph has {found.targets}, needs {operator or 'its operators'}", rank)
    judge(subject, site, Values(), [found.outcome for found in by_rank])


@check(needs_device=True)
def takes_any_number_of_dimensions_or_refuses(subject: Subject) -> None:
    """It is correct for inputs of one to four dimensions, or refuses with reasons."""
    device, sizes = here(subject)
    plain = example(subject, device, sizes[0])
    n = int(plain.inputs["x"].shape[-1])
    shapes = ((*rows, n) for rows in ((), (3,), (2, 3), (2, 1, 3)))
    compare_each(subject, ((resized(subject.pattern, plain, shape), Values(seed=1)) for shape in shapes))


@check(needs_device=True)
def gives_the_same_bits_on_every_rank(subject: Subject) -> None:
    """Every rank gets the same bits of every output, also in float32 at the largest world size."""
    device, sizes = here(subject)

    if subject.pattern.by_rank:
        raise CheckNotApplicable("each rank has its own part of the result")
    largest = pools.every_world_size(subject, device.type)[-1]
    plain = example(subject, device, sizes[0])

    def alike(drawn: Example) -> None:
        site, values = drawn
        if refused(subject, site):
            return
        first, *others = run(subject, site, jobs.compare, values)
        for rank, outcome in enumerate(others, 1):
            if differing := [name for name, bits in outcome.bits.items() if bits != first.bits.get(name)]:
                found = f"{', '.join(differing)} has other bits than on rank 0, needs the same bits on every rank"
                fail(subject, site, found, rank, values)

    fixed = [(plain, Values()), (in_float32(subject, example(subject, device, largest)), Values())]
    for one in chosen(fixed):
        alike(one)
    for_all(subject, alike, examples(subject, device, [size for size in sizes if size > 1] or sizes), factor=0.1)


@check(needs_device=True)
def gives_a_row_the_same_bits_in_every_batch(subject: Subject) -> None:
    """If it is declared batch-invariant, a row's bits do not depend on the other rows."""
    device, sizes = here(subject)
    if not subject.strategy.batch_invariant:
        raise CheckNotApplicable("it is not declared batch-invariant")
    plains = [example(subject, device, size) for size in sizes]
    shapes = [(plain, (BATCHES[-1], int(plain.inputs["x"].shape[-1]))) for plain in plains]
    for site, _ in chosen((resized(subject.pattern, plain, shape), None) for plain, shape in shapes):
        for rank, found in enumerate(run(subject, site, jobs.bits_of_the_first_row, Values(), BATCHES)):
            if differing := sorted({name for bits in found[1:] for name in bits if bits[name] != found[0][name]}):
                what = f"the first row of {', '.join(differing)} has other bits in batches of {BATCHES} rows"
                fail(subject, site, f"{what}, needs the same, or no batch_invariant=True", rank)


@check(needs_device=True)
def can_be_repeated_and_used_in_two_groups(subject: Subject) -> None:
    """Called alternately on two process groups, it leaves earlier results alone and returns correct ones each time."""
    device, sizes = here(subject)
    ((site, _),) = chosen([(example(subject, device, sizes[0]), None)])
    calls = [Values(seed=seed) for seed in range(3)]
    by_rank = run(subject, site, jobs.compare_in_turn, calls)
    for index in range(2 * len(calls)):
        values = calls[index // 2]
        where = f"call {index + 1} of {2 * len(calls)}, in turn on two groups: "
        judge(subject, site, values, [outcomes[index] for outcomes in by_rank], where)


@check(needs_device=True)
def takes_no_rows_or_refuses(subject: Subject) -> None:
    """With zero rows it returns empty outputs of the right shape and dtype, or refuses with reasons."""
    device, sizes = here(subject)
    plain = example(subject, device, sizes[0])
    n = int(plain.inputs["x"].shape[-1])
    compare_each(subject, ((resized(subject.pattern, plain, shape), Values()) for shape in ((0, n), (2, 0, n))))


for _more in ("checks_of_sizes", "checks_of_workspaces"):  # they register their checks after these
    importlib.import_module(f"fusion_core.testing.{_more}")
CHECKS: tuple[Check, ...] = tuple(_CHECKS)
"""All checks; those that need no device come first."""
