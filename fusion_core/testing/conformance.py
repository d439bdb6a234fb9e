"""The conformance kit as pytest tests.

A backend's own test file is two lines::

    from fusion_core.testing.conformance import *  # noqa: F403
    BACKEND = "acme"

Each test runs for each strategy of ``BACKEND``. Tests that this machine cannot run are skipped with the backend's own
reason; under ``FUSION_CORE_STRICT=1`` they fail, so that CI on a GPU cannot pass by skipping. A third line,
``ENTRY_POINT = "package.module:object"``, tests a plugin that no installed distribution registers.
"""

from __future__ import annotations

from typing import Any

import pytest

from fusion_core.config import FusionConfig
from fusion_core.errors import FusionError
from fusion_core.testing.checks import CHECKS, Check, CheckFailed, CheckNotApplicable, CheckSkipped
from fusion_core.testing.subject import Subject, subjects

STRICT = FusionConfig().strict  # read at import: a test may change the environment
_CHECKS = {check.name: check for check in CHECKS}

__all__ = [
    "pytest_generate_tests",
    "test_accepts_its_own_example",
    "test_can_be_repeated_and_used_in_two_groups",
    "test_declares_what_the_definition_gives",
    "test_equals_the_oracle_where_it_accepts",
    "test_fake_matches_real",
    "test_gives_a_row_the_same_bits_in_every_batch",
    "test_gives_the_same_bits_on_every_rank",
    "test_goes_on_where_a_workspace_fails",
    "test_is_right_at_every_world_size",
    "test_is_right_at_large_sizes_and_at_its_bounds",
    "test_leaves_its_inputs_alone",
    "test_loads",
    "test_refuses_on_the_wrong_side_of_each_requirement",
    "test_stands_in_the_compiled_graph",
    "test_takes_any_number_of_dimensions_or_refuses",
    "test_takes_no_rows_or_refuses",
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that take a ``subject`` for each strategy of the module's ``BACKEND``."""
    if "load_failure" in metafunc.fixturenames:
        metafunc.parametrize("load_failure", [_found(metafunc)[1]], ids=[_backend(metafunc)])
    if "subject" in metafunc.fixturenames:
        found, failure = _found(metafunc)
        reason = failure or f"backend {_backend(metafunc)!r} has no strategies"
        nothing = pytest.param(None, id=_backend(metafunc), marks=pytest.mark.skip(reason=reason))
        metafunc.parametrize("subject", [pytest.param(each, id=each.name) for each in found] or [nothing])


def _backend(metafunc: pytest.Metafunc) -> str:
    return str(getattr(metafunc.module, "BACKEND", ""))


def _found(metafunc: pytest.Metafunc) -> tuple[tuple[Subject, ...], str]:
    """The strategies of the module's backend, or the reason why there are none."""
    backend = _backend(metafunc)
    if not backend:
        return (), f'{metafunc.module.__name__} has no BACKEND, needs BACKEND = "<name of your entry point>"'
    try:
        return subjects(backend, getattr(metafunc.module, "ENTRY_POINT", None)), ""
    except FusionError as error:
        return (), str(error)


def verify(check: Check, subject: Any) -> None:
    """Run one check, with its outcome as pytest's."""
    __tracebackhide__ = True
    verdict: FusionError
    try:
        check.run(subject)
        return
    except (CheckFailed, CheckSkipped) as error:
        verdict = error
    if isinstance(verdict, CheckFailed):
        pytest.fail(str(verdict), pytrace=False)
    if STRICT and not isinstance(verdict, CheckNotApplicable):
        pytest.fail(f"{verdict}\n  FUSION_CORE_STRICT is set: what cannot run here fails", pytrace=False)
    pytest.skip(str(verdict))


def test_loads(load_failure: str) -> None:
    """The backend is installed and loads."""
    if load_failure:
        pytest.fail(load_failure, pytrace=False)


def test_accepts_its_own_example(subject: Subject) -> None:
    """The strategy can run some ordinary site."""
    verify(_CHECKS["accepts_its_own_example"], subject)


def test_refuses_on_the_wrong_side_of_each_requirement(subject: Subject) -> None:
    """Each requirement is met just inside its bounds, and refuses with a reason just outside."""
    verify(_CHECKS["refuses_on_the_wrong_side_of_each_requirement"], subject)


def test_declares_what_the_definition_gives(subject: Subject) -> None:
    """On fake tensors its outputs have the definition's shapes and dtypes."""
    verify(_CHECKS["declares_what_the_definition_gives"], subject)


def test_equals_the_oracle_where_it_accepts(subject: Subject) -> None:
    """At each site its outputs are as close to the float64 oracle as the definition's, or it refuses with reasons."""
    verify(_CHECKS["equals_the_oracle_where_it_accepts"], subject)


def test_leaves_its_inputs_alone(subject: Subject) -> None:
    """It writes to no input, nor to the gaps between an input's elements, unless its operator's schema declares it."""
    verify(_CHECKS["leaves_its_inputs_alone"], subject)


def test_fake_matches_real(subject: Subject) -> None:
    """Its fake returns the shapes, dtypes and strides of the real results, and `torch.library.opcheck` passes."""
    verify(_CHECKS["fake_matches_real"], subject)


def test_stands_in_the_compiled_graph(subject: Subject) -> None:
    """torch.compile puts it where its pattern matches, and the results stay correct."""
    verify(_CHECKS["stands_in_the_compiled_graph"], subject)


def test_takes_any_number_of_dimensions_or_refuses(subject: Subject) -> None:
    """It is correct for inputs of one to four dimensions, or refuses with reasons."""
    verify(_CHECKS["takes_any_number_of_dimensions_or_refuses"], subject)


def test_gives_the_same_bits_on_every_rank(subject: Subject) -> None:
    """Every rank gets the same bits of every output, also in float32 at the largest world size."""
    verify(_CHECKS["gives_the_same_bits_on_every_rank"], subject)


def test_gives_a_row_the_same_bits_in_every_batch(subject: Subject) -> None:
    """If it is declared batch-invariant, a row's bits do not depend on the other rows."""
    verify(_CHECKS["gives_a_row_the_same_bits_in_every_batch"], subject)


def test_goes_on_where_a_workspace_fails(subject: Subject) -> None:
    """Where making a workspace or checking its kernel fails on a rank, all ranks are right without it, and say why."""
    verify(_CHECKS["goes_on_where_a_workspace_fails"], subject)


def test_can_be_repeated_and_used_in_two_groups(subject: Subject) -> None:
    """Called alternately on two process groups, it leaves earlier results alone and returns correct ones each time."""
    verify(_CHECKS["can_be_repeated_and_used_in_two_groups"], subject)


def test_takes_no_rows_or_refuses(subject: Subject) -> None:
    """With zero rows it returns empty outputs of the right shape and dtype, or refuses with reasons."""
    verify(_CHECKS["takes_no_rows_or_refuses"], subject)


def test_is_right_at_large_sizes_and_at_its_bounds(subject: Subject) -> None:
    """It is correct with many rows, with wide rows and at each bound that it declares, or refuses with reasons."""
    verify(_CHECKS["is_right_at_large_sizes_and_at_its_bounds"], subject)


def test_is_right_at_every_world_size(subject: Subject) -> None:
    """It is correct at every world size that it accepts and this machine can run."""
    verify(_CHECKS["is_right_at_every_world_size"], subject)
