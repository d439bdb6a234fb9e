"""The conformance kit as pytest tests.

A backend's own test file is two lines::

    from fusion_core.testing.conformance import *  # noqa: F403
    BACKEND = "acme"

Each test runs for each strategy of ``BACKEND``. What this machine cannot run is skipped with the backend's own reason;
under ``FUSION_CORE_STRICT=1`` that is a failure, so that a GPU's CI cannot pass by skipping. A third line,
``ENTRY_POINT = "package.module:object"``, tests a plugin that no installed distribution names.
"""

from __future__ import annotations

from typing import Any

import pytest

from fusion_core.config import FusionConfig
from fusion_core.errors import FusionError
from fusion_core.testing.checks import CHECKS, Check, CheckFailed, CheckNotApplicable, CheckSkipped
from fusion_core.testing.subject import Subject, subjects

STRICT = FusionConfig().strict  # now: a test's environment may be another
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
    """The strategies of the module's backend, or why there are none."""
    backend = _backend(metafunc)
    if not backend:
        return (), f'{metafunc.module.__name__} has no BACKEND, needs BACKEND = "<name of your entry point>"'
    try:
        return subjects(backend, getattr(metafunc.module, "ENTRY_POINT", None)), ""
    except FusionError as error:
        return (), str(error)


def verify(check: Check, subject: Any) -> None:
    """One check as a pytest outcome."""
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
    """There is an ordinary site that the strategy can run."""
    verify(_CHECKS["accepts_its_own_example"], subject)


def test_refuses_on_the_wrong_side_of_each_requirement(subject: Subject) -> None:
    """Each requirement holds just inside of its bounds, and refuses with a reason just outside."""
    verify(_CHECKS["refuses_on_the_wrong_side_of_each_requirement"], subject)


def test_declares_what_the_definition_gives(subject: Subject) -> None:
    """On fake tensors it gives the outputs of the definition, in shape and dtype."""
    verify(_CHECKS["declares_what_the_definition_gives"], subject)


def test_equals_the_oracle_where_it_accepts(subject: Subject) -> None:
    """Where it accepts, its outputs are as near to the float64 oracle as the definition's; elsewhere it says why."""
    verify(_CHECKS["equals_the_oracle_where_it_accepts"], subject)


def test_leaves_its_inputs_alone(subject: Subject) -> None:
    """It writes into no input, nor into the gaps of one, unless its operator's schema says so."""
    verify(_CHECKS["leaves_its_inputs_alone"], subject)


def test_fake_matches_real(subject: Subject) -> None:
    """Its fake gives the shapes, dtypes and strides that it really gives, and `torch.library.opcheck` agrees."""
    verify(_CHECKS["fake_matches_real"], subject)


def test_stands_in_the_compiled_graph(subject: Subject) -> None:
    """torch.compile puts it where its pattern stands, and the answer stays right."""
    verify(_CHECKS["stands_in_the_compiled_graph"], subject)


def test_takes_any_number_of_dimensions_or_refuses(subject: Subject) -> None:
    """With inputs of one to four dimensions it is right, or it refuses with reasons."""
    verify(_CHECKS["takes_any_number_of_dimensions_or_refuses"], subject)


def test_gives_the_same_bits_on_every_rank(subject: Subject) -> None:
    """Every rank gets the same bits of every output, in float32 at the largest world size too."""
    verify(_CHECKS["gives_the_same_bits_on_every_rank"], subject)


def test_gives_a_row_the_same_bits_in_every_batch(subject: Subject) -> None:
    """Where it says that it is batch-invariant, a row's bits do not depend on the other rows."""
    verify(_CHECKS["gives_a_row_the_same_bits_in_every_batch"], subject)


def test_can_be_repeated_and_used_in_two_groups(subject: Subject) -> None:
    """Called in turn on two process groups, it leaves earlier results alone and gives right ones each time."""
    verify(_CHECKS["can_be_repeated_and_used_in_two_groups"], subject)


def test_takes_no_rows_or_refuses(subject: Subject) -> None:
    """With zero rows it gives empty outputs of the right form, or refuses with reasons."""
    verify(_CHECKS["takes_no_rows_or_refuses"], subject)


def test_is_right_at_large_sizes_and_at_its_bounds(subject: Subject) -> None:
    """With many rows, wide ones, and at each bound that it declares it is right, or it refuses with reasons."""
    verify(_CHECKS["is_right_at_large_sizes_and_at_its_bounds"], subject)


def test_is_right_at_every_world_size(subject: Subject) -> None:
    """At every world size that it takes, and that this machine can run, it is right."""
    verify(_CHECKS["is_right_at_every_world_size"], subject)
