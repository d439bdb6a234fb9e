"""The kit ends the process of a rank: what the other ranks make of it is an outcome, or the backend is caught."""

import pytest

from fusion_core.testing import CHECKS, CheckFailed, checks_of_workspaces, faulty, subjects

RUN = next(check.run for check in CHECKS if check.name == "goes_on_where_a_workspace_fails")


@pytest.fixture(autouse=True)
def _deaths_alone(monkeypatch):
    """Other faults of the kit are in `test_kit_catches`."""
    monkeypatch.setattr(checks_of_workspaces, "ANYWHERE", ())
    monkeypatch.setattr(checks_of_workspaces, "ON_A_CPU", ())
    monkeypatch.setattr(checks_of_workspaces, "_first", {})


def subject_of(name):
    (subject,) = subjects("wrong", f"tests.testing.wrong_workspaces:{name}", 20)
    return subject


def test_an_error_on_the_others_is_an_outcome():
    RUN(subject_of("says_that_a_rank_has_died"))


def test_a_sum_without_the_dead_rank_is_caught():
    with pytest.raises(CheckFailed, match=r"where create dies on one rank, call 1 gives results .* times as far"):
        RUN(subject_of("adds_nothing_of_the_dead"))


@pytest.mark.parametrize("method", [pytest.param("create", marks=pytest.mark.nightly), "run"])
def test_a_rank_that_waits_for_the_dead_one_is_caught(method, monkeypatch):
    monkeypatch.setattr(checks_of_workspaces, "DEATHS", (faulty.Fault(method, "dies", "last"),))
    monkeypatch.setattr(faulty, "MOST_SECONDS_AFTER_A_DEATH", 15.0)
    with pytest.raises(CheckFailed, match=r"(?s)rank 0 of 2 did not finish .*where_a_rank_dies within 15 s.*_for_ever"):
        RUN(subject_of("waits_for_the_dead"))
