"""The fault campaign: runs and judges each row of every area. ``make test-faults`` runs the slow ones too."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.faults.fault import Fault, judge

AREAS = sorted(
    file.stem for file in Path(__file__).parent.glob("*.py") if "\nROWS" in file.read_text() and file.stem != "fault"
)


def _rows() -> list[object]:
    rows = [row for area in AREAS for row in importlib.import_module(f"tests.faults.{area}").ROWS]
    return [pytest.param(row, id=row.id, marks=[pytest.mark.campaign] if row.slow else []) for row in rows]


@pytest.mark.parametrize("row", _rows())
def test_a_fault_ends_as_the_table_says(
    row: Fault, request: pytest.FixtureRequest, record_property: pytest.FixtureRequest
) -> None:
    area = importlib.import_module(f"tests.faults.{row.area}")
    fixtures = {name: request.getfixturevalue(name) for name in getattr(area, "FIXTURES", ())}
    verdict = area.observe(**row.given, **fixtures)
    record_property("fault", (row.area, row.name, row.fault, verdict))
    judge(row, verdict)


def test_every_row_has_a_name_of_its_own() -> None:
    names = [parameter.id for parameter in _rows()]
    assert len(names) == len(set(names))
