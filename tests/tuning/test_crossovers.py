"""Where one path takes over from another, in recorded tables of two machines and in made-up ones."""

from itertools import pairwise
from pathlib import Path

import pytest

from fusion_core.cli import plotting
from fusion_core.cli.tune_drawing import drawing, panels
from fusion_core.tables import UNFUSED, Machine, Row, Table
from fusion_core.tables.store import read
from fusion_core.tune.crossovers import crossovers, fastest, series

ADD = "all_reduce_add_rms_norm"
RECORDED = {ranks: read(Path(__file__).parent / f"h200x{ranks}.json") for ranks in (2, 4)}


def table(*rows):
    return Table(Machine("Acme 9000", world_size=2), rows, "2026-11-22T10:00:00+00:00", "a test")


def row(tokens, hidden=64, pattern="all_reduce", **us):
    return Row(pattern, "bfloat16", hidden, tokens, {f"acme.{n}" if n != UNFUSED else n: us[n] for n in us})


@pytest.mark.parametrize("ranks", RECORDED)
def test_ranges_of_a_recorded_table_are_its_points(ranks):
    recorded = RECORDED[ranks]
    found = crossovers(recorded)
    assert len(found) > 1
    for each in found:
        inside = [row for row in recorded.rows if each.first <= row.tokens <= each.last]
        assert inside
        for point in inside:
            assert point.us[each.path] == min(point.us.values())
        assert each.us == (inside[0].us[each.path], inside[-1].us[each.path])
        assert each.gains == tuple(of / us for of, us in zip(each.unfused, each.us, strict=True))
    counts = [row.tokens for row in recorded.rows]
    assert found[0].first == min(counts)
    assert found[-1].last == max(counts)
    for before, after in pairwise(found):
        assert before.path != after.path
        assert counts.index(after.first) == counts.index(before.last) + 1


def test_what_the_recorded_machine_of_four_has_in_the_middle():
    (middle,) = [each for each in crossovers(RECORDED[4]) if each.first <= 256 <= each.last]
    assert middle.path == "reference.symm_mem_two_shot"


def test_patterns_and_hidden_sizes_stand_apart_and_rows_in_any_order():
    rows = (row(8, unfused=2, a=1), row(1, unfused=2, a=1), row(1, 32, unfused=1, a=2), row(8, 32, unfused=2, a=1))
    more = (row(1, pattern=ADD, unfused=2, a=3),)
    found = [(each.pattern, each.hidden, each.first, each.last, each.path) for each in crossovers(table(*rows, *more))]
    assert found == [
        ("all_reduce", 64, 1, 8, "acme.a"),
        ("all_reduce", 32, 1, 1, UNFUSED),
        ("all_reduce", 32, 8, 8, "acme.a"),
        (ADD, 64, 1, 1, UNFUSED),
    ]


def test_of_equals_the_unfused_path_comes_first_then_names():
    assert fastest({"acme.a": 1.0, UNFUSED: 1.0}) == UNFUSED
    assert fastest({"acme.b": 1.0, "acme.a": 1.0, UNFUSED: 2.0}) == "acme.a"


def test_a_drawing_has_a_bar_for_each_count():
    rows = [row(1, unfused=20, a=10), row(8, unfused=20, a=40), row(16, unfused=20, a=16)]
    lines = drawing(rows, ascii_only=True).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "8", "16"]
    assert lines[0].endswith("2.00x 10.0 us acme.a")
    assert lines[1].endswith("1.00x 20.0 us unfused")
    assert lines[0].count("#") > lines[2].count("#") > lines[1].count("#") == 0
    assert "×" in drawing(rows, ascii_only=False)


def test_one_path_is_one_line_in_every_panel():
    own, two = f"flashinfer.{ADD}", f"flashinfer.{ADD}_two_shot"
    static = f"{ADD}_static_fp8"
    rows = [
        Row(ADD, "bfloat16", 64, 1, {UNFUSED: 2.0, own: 1.0, two: 4.0, "flashinfer.all_reduce": 1.5}),
        Row(static, "bfloat16", 64, 1, {UNFUSED: 2.0, f"flashinfer.{static}": 1.0, "flashinfer.all_reduce": 1.0}),
    ]
    first, second = panels(table(*rows))
    labels = ["flashinfer fused", "flashinfer fused two_shot", "flashinfer.all_reduce"]
    assert [line.label for line in first.lines] == [line.label for line in second.lines] == labels
    assert [list(line.points) for line in second.lines] == [[(1, 2.0)], [], [(1, 2.0)]]
    assert first.base == 1.0
    assert ADD in first.title


def test_panels_of_a_recorded_table_become_a_plot():
    pytest.importorskip("matplotlib")
    text = plotting.svg("2 × H200", panels(RECORDED[2]))
    assert "<svg" in text
    assert len(series(RECORDED[2])) == len(panels(RECORDED[2]))
