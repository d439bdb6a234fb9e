"""What a table says: at its points, between them, and nothing beyond; and what is no table."""

import copy
import dataclasses
import itertools
import json
import math
import timeit
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from fusion_core import ConfigError
from fusion_core.tables import UNFUSED, Machine, Row, Table, TableError
from fusion_core.tables.store import read

FOLDER = Path(__file__).parent
ADD = "all_reduce_add_rms_norm"
ONE_SHOT, TWO_SHOT = f"flashinfer.{ADD}", f"flashinfer.{ADD}_two_shot"
BARE, SYMM = "flashinfer.all_reduce", "reference.symm_mem_two_shot"
MADE = "2026-11-22T10:00:00+00:00"
RECORDED = {ranks: read(FOLDER / f"h200x{ranks}.json") for ranks in (2, 4)}


def table(*rows: Row) -> Table:
    return Table(Machine("Acme 9000", world_size=2), rows, MADE, "a test")


def point(hidden: int, tokens: int, unfused: float, dtype: str = "bfloat16", **us: float) -> Row:
    return Row("all_reduce", dtype, hidden, tokens, {UNFUSED: unfused, **{f"acme.{name}": us[name] for name in us}})


def bf16(measured: Table, hidden: int, tokens: int) -> dict[str, float]:
    return measured.figures("all_reduce", torch.bfloat16, hidden, tokens)


# figures


@pytest.mark.parametrize("ranks", RECORDED)
def test_a_measured_point_has_its_figures_to_the_last_digit(ranks: int) -> None:
    for row in RECORDED[ranks].rows:
        assert RECORDED[ranks].figures(row.pattern, torch.bfloat16, row.hidden, row.tokens) == row.us


@pytest.mark.parametrize("ranks", RECORDED)
def test_between_two_points_a_figure_lies_between_their_times_and_moves_one_way(ranks: int) -> None:
    recorded, rows = RECORDED[ranks], RECORDED[ranks].rows
    for low, high in itertools.pairwise(rows):
        counts = range(low.tokens, high.tokens + 1, max(1, (high.tokens - low.tokens) // 50))
        lines = [recorded.figures(ADD, torch.bfloat16, 8192, tokens) for tokens in counts]
        for name in low.us.keys() & high.us.keys():
            line = [figures[name] for figures in lines]
            assert line == sorted(line, reverse=low.us[name] > high.us[name])
            assert min(low.us[name], high.us[name]) <= min(line) <= max(line) <= max(low.us[name], high.us[name])


def test_halfway_between_two_points_is_the_geometric_mean_in_tokens_and_in_hidden_size() -> None:
    measured = table(point(1024, 1, 10), point(1024, 16, 40), point(4096, 1, 90), point(4096, 16, 640))
    assert bf16(measured, 1024, 4)[UNFUSED] == pytest.approx(20)
    assert bf16(measured, 2048, 1)[UNFUSED] == pytest.approx(30)
    assert bf16(measured, 2048, 16)[UNFUSED] == pytest.approx(160)
    assert bf16(measured, 2048, 4)[UNFUSED] == pytest.approx(math.sqrt(30 * 160))
    assert bf16(measured, 1024, 2)[UNFUSED] == pytest.approx(10 * 4**0.25)  # not halfway


def test_a_way_that_did_not_run_at_a_point_that_is_needed_has_no_figure() -> None:
    recorded = RECORDED[4]
    assert TWO_SHOT not in recorded.figures(ADD, torch.bfloat16, 8192, 1)
    assert TWO_SHOT not in recorded.figures(ADD, torch.bfloat16, 8192, 7)
    assert TWO_SHOT in recorded.figures(ADD, torch.bfloat16, 8192, 8)
    assert ONE_SHOT in recorded.figures(ADD, torch.bfloat16, 8192, 7)
    rows = [point(h, t, 10.0, late=5.0) for h in (1024, 4096) for t in (1, 16)]
    rows[-1] = point(4096, 16, 10.0)  # one corner of four lacks it
    measured = table(*rows)
    assert bf16(measured, 2048, 4) == {UNFUSED: 10.0}
    assert bf16(measured, 2048, 1) == {UNFUSED: 10.0, "acme.late": 5.0}
    assert bf16(measured, 4096, 4) == {UNFUSED: 10.0}
    measured = table(*rows[:-1], point(4096, 16, 10.0, late=5.0, other=3.0))
    assert "acme.other" not in bf16(measured, 4096, 8)  # only the upper point has it


@pytest.mark.parametrize(
    ("hidden", "tokens"), [(8192, 0), (8192, 1025), (8191, 8), (8193, 8), (8193, 2000), (4096, 8), (16384, 300)]
)
def test_nothing_is_said_beyond_the_outermost_points(hidden: int, tokens: int) -> None:
    assert RECORDED[4].figures(ADD, torch.bfloat16, hidden, tokens) == {}


def test_nothing_is_said_about_another_pattern_or_size_of_dtype() -> None:
    recorded = RECORDED[4]
    assert recorded.figures(f"{ADD}_static_fp8", torch.bfloat16, 8192, 8) == {}
    assert recorded.figures(ADD, torch.float32, 8192, 8) == {}
    assert table().figures(ADD, torch.bfloat16, 8192, 8) == {}


def test_float16_and_bfloat16_stand_for_each_other_where_only_one_was_measured() -> None:
    measured = table(point(64, 1, 10))
    assert measured.figures("all_reduce", torch.float16, 64, 1) == {UNFUSED: 10.0}
    measured = table(point(64, 1, 10, "float16"), point(64, 1, 30, "float32"))
    assert bf16(measured, 64, 1) == {UNFUSED: 10.0}
    assert measured.figures("all_reduce", torch.float32, 64, 1) == {UNFUSED: 30.0}
    measured = table(point(64, 1, 10, "float16"), point(64, 1, 20))
    assert bf16(measured, 64, 1) == {UNFUSED: 20.0}
    assert measured.figures("all_reduce", torch.float16, 64, 1) == {UNFUSED: 10.0}


def lowest(ranks: int, tokens: int) -> str:
    figures = RECORDED[ranks].figures(ADD, torch.bfloat16, 8192, tokens)
    return min(figures, key=figures.__getitem__)


def test_the_recorded_crossovers_are_found() -> None:
    assert [lowest(4, tokens) for tokens in (32, 64, 65, 128, 256, 1024)] == [ONE_SHOT] * 3 + [SYMM] * 3
    assert [lowest(2, tokens) for tokens in (32, 128, 512)] == [ONE_SHOT] * 3
    # FlashInfer's bare sum with Inductor's norm was 4 % below its fused kernel at 8 tokens, all others far above
    figures = RECORDED[4].figures(ADD, torch.bfloat16, 8192, 8)
    assert sorted(figures, key=figures.__getitem__)[:2] == [BARE, ONE_SHOT]
    # the static rule "FlashInfer's one-shot" loses to the unfused path between 128 and 256 tokens
    below = [
        t for t in range(1, 1025) if (f := RECORDED[4].figures(ADD, torch.bfloat16, 8192, t))[ONE_SHOT] < f[UNFUSED]
    ]
    assert below == list(range(1, below[-1] + 1))
    assert 128 < below[-1] < 256


def test_a_figure_costs_microseconds() -> None:
    rows = [point(h, 2**t, 10.0, a=5, b=6, c=7, d=8, e=9) for h in (2048, 4096, 8192) for t in range(15)]
    measured = table(*rows)
    assert min(timeit.repeat(lambda: bf16(measured, 3000, 100), number=1000, repeat=5)) / 1000 < 100e-6


# properties

TIMES = st.floats(1e-3, 1e6)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    sizes = st.integers(1, 20000)
    rows = []
    for dtype in draw(st.sets(st.sampled_from(["bfloat16", "float32"]), min_size=1)):
        tokens = draw(st.sets(sizes, min_size=1, max_size=4))
        for hidden in draw(st.sets(sizes, min_size=1, max_size=3)):
            for count in tokens:
                us = draw(st.dictionaries(st.sampled_from(["acme.a", "acme.b", "b.c"]), TIMES))
                rows.append(Row("all_reduce", dtype, hidden, count, {UNFUSED: draw(TIMES), **us}))
    return table(*draw(st.permutations(rows)))


@given(tables(), st.data())
def test_every_figure_lies_between_the_times_of_the_points_around_it(measured: Table, data: Any) -> None:
    row = data.draw(st.sampled_from(measured.rows))
    rows = [other for other in measured.rows if other.dtype == row.dtype]
    sizes, counts = sorted({r.hidden for r in rows}), sorted({r.tokens for r in rows})
    hidden = data.draw(st.integers(sizes[0], sizes[-1]))
    tokens = data.draw(st.integers(counts[0], counts[-1]))
    around = {max(h for h in sizes if h <= hidden), min(h for h in sizes if h >= hidden)}
    beside = {max(t for t in counts if t <= tokens), min(t for t in counts if t >= tokens)}
    corners = [r.us for r in rows if r.hidden in around and r.tokens in beside]
    figures = measured.figures("all_reduce", getattr(torch, row.dtype), hidden, tokens)
    assert figures.keys() == set.intersection(*(set(us) for us in corners))
    for name, figure in figures.items():
        times = [us[name] for us in corners]
        assert min(times) * (1 - 1e-9) <= figure <= max(times) * (1 + 1e-9)


@given(tables(), st.floats(1e-2, 1e2), st.integers(1, 20000), st.integers(1, 20000))
def test_a_machine_twice_as_slow_has_figures_twice_as_high(
    measured: Table, factor: float, hidden: int, tokens: int
) -> None:
    factor = min(max(factor, 1e-3 / min(us for row in measured.rows for us in row.us.values())), 1e3)
    scaled = table(
        *(dataclasses.replace(row, us={name: us * factor for name, us in row.us.items()}) for row in measured.rows)
    )
    slower = bf16(scaled, hidden, tokens)
    assert slower == pytest.approx({name: us * factor for name, us in bf16(measured, hidden, tokens).items()})


@given(tables())
def test_a_table_goes_to_json_and_back(measured: Table) -> None:
    again = Table.from_dict(json.loads(json.dumps(measured.to_dict())))
    assert again == measured
    assert again.fingerprint == measured.fingerprint


# the fingerprint


def test_the_fingerprint_covers_what_decides_and_nothing_else() -> None:
    rows = [point(64, 1, 10, a=5), point(64, 2, 20, a=6)]
    measured = table(*rows)
    same = Table(Machine("Other"), (rows[1], point(64, 1, 10.0, a=5.0)), "2025-01-01T00:00:00Z", "another")
    assert same.fingerprint == measured.fingerprint
    for row in (
        point(64, 1, 10, a=5.1),
        point(64, 1, 10, b=5),
        point(64, 1, 10),
        point(64, 1, 10, "float16", a=5),
        dataclasses.replace(rows[0], pattern="all_reduce_rms_norm"),
    ):
        assert table(row, rows[1]).fingerprint != measured.fingerprint
    assert table(*(dataclasses.replace(r, hidden=65) for r in rows)).fingerprint != measured.fingerprint
    assert table(dataclasses.replace(rows[0], tokens=3), rows[1]).fingerprint != measured.fingerprint


# what is no table


def document() -> dict[str, Any]:
    return json.loads((FOLDER / "h200x4.json").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    """The document with what stands at ``path``, like ``rows/0/us``, replaced by ``value``."""
    whole = found = document()
    *steps, last = [int(step) if step.isdecimal() else step for step in path.split("/")]
    for step in steps:
        found = found[step]
    found[last] = value
    return whole


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 2, "schema is 2, needs 1; fusion-core tune writes a table in that form"),
        ("schema", True, "schema is True, needs a whole number"),
        ("schema", 1.0, "schema is 1.0, needs a whole number"),
        ("machine", [], r"machine is \[\], needs an object with gpu, arch"),
        ("machine/gpu", "", "machine.gpu is '', needs text of 1 to 1000 printable characters"),
        ("machine/gpu", 5, "machine.gpu is 5, needs text"),
        ("machine/arch", None, "machine.arch is None, needs text"),
        ("machine/links", "a\x1b[2J", r"machine.links is 'a\\x1b\[2J', needs text"),
        ("machine/driver", "9" * 1001, "machine.driver is '9+...9+', needs text"),
        ("machine/world_size", 0, "machine.world_size is 0, needs a whole number from 1 to"),
        ("machine/world_size", 2.0, "machine.world_size is 2.0, needs a whole number"),
        ("machine/versions", ["torch"], r"machine.versions is \['torch'\], needs an object"),
        ("machine/versions", {"torch": 2.11}, "machine.versions.torch is 2.11, needs text"),
        ("machine/versions", {5: "2.11"}, "machine.versions has the key 5, needs an object"),
        ("machine/versions", {"": "2.11"}, "machine.versions has the key '', needs an object"),
        ("rows/3/us/acme.\x1b[2J", 5.0, r"rows\[3\].us has the key 'acme.\\x1b\[2J', needs an object"),
        ("machine/host", "here", "machine has the key 'host', needs an object with gpu, arch"),
        ("made", "yesterday", "made is 'yesterday', needs an ISO time in UTC"),
        ("made", "2026-11-22T10:00:00", "needs an ISO time in UTC"),
        ("made", "2026-11-22T10:00:00+01:00", "needs an ISO time in UTC"),
        ("made", 5, "made is 5, needs an ISO time in UTC"),
        ("command", None, "command is None, needs text"),
        ("comment", "mine", "the table has the key 'comment', needs an object with schema, machine"),
        ("rows", {}, r"rows is \{\}, needs a list"),
        ("rows/3", 7, r"rows\[3\] is 7, needs an object with pattern, dtype"),
        ("rows/3", {"pattern": "a"}, r"rows\[3\] has no dtype, hidden, tokens, us, needs an object"),
        ("rows/3/tokns", 5, r"rows\[3\] has the key 'tokns', needs an object"),
        ("rows/3/pattern", "", r"rows\[3\].pattern is '', needs text"),
        ("rows/3/dtype", "bf16", r"rows\[3\].dtype is 'bf16', needs one of bfloat16, float16"),
        ("rows/3/dtype", ["bfloat16"], r"rows\[3\].dtype is \['bfloat16'\], needs one of"),
        ("rows/3/hidden", -8192, r"rows\[3\].hidden is -8192, needs a whole number"),
        ("rows/3/tokens", True, r"rows\[3\].tokens is True, needs a whole number"),
        ("rows/3/tokens", "64", r"rows\[3\].tokens is '64', needs a whole number"),
        ("rows/3/tokens", 2**31, r"rows\[3\].tokens is 2147483648, needs a whole number"),
        pytest.param("rows/3/tokens", 10**5000, r"rows\[3\].tokens is of type int, needs a whole number", id="huge"),
        ("rows/3/us", 5.0, r"rows\[3\].us is 5.0, needs an object"),
        ("rows/3/us", {}, r"rows\[3\].us has \[\], needs 'unfused' too"),
        ("rows/3/us", {BARE: 5.0}, r"rows\[3\].us has \['flashinfer.all_reduce'\], needs 'unfused' too"),
        ("rows/3/us/fused", 5.0, r"rows\[3\].us has 'fused', needs 'unfused' or the name of a strategy"),
        ("rows/3/us/acme.", 5.0, r"rows\[3\].us has 'acme.', needs 'unfused' or the name of a strategy"),
        ("rows/3/us/unfused", True, r"rows\[3\].us.unfused is True, needs microseconds, a number from 0.001 to 1e\+09"),
        ("rows/3/us/unfused", "5", r"rows\[3\].us.unfused is '5', needs microseconds"),
        ("rows/3/us/unfused", 0, r"rows\[3\].us.unfused is 0, needs microseconds"),
        ("rows/3/us/unfused", -5.0, r"rows\[3\].us.unfused is -5.0, needs microseconds"),
        ("rows/3/us/unfused", math.nan, r"rows\[3\].us.unfused is nan, needs microseconds"),
        ("rows/3/us/acme.a", math.inf, r"rows\[3\].us.acme.a is inf, needs microseconds"),
        ("rows/3/us/unfused", 10**400, r"rows\[3\].us.unfused is 1000+...0+, needs microseconds"),
        ("rows/3/tokens", 32, r"rows\[3\] measures .* a second time, needs each point once"),
        ("rows/3/hidden", 4096, r"have tokens \[1, 8, 32, 64, 128, 256, ...\] at only one of hidden 8192 and 4096"),
    ],
)
def test_what_is_no_table_is_refused_with_the_place_what_is_there_and_what_must_be(
    path: str, value: Any, message: str
) -> None:
    with pytest.raises(TableError, match=message):
        Table.from_dict(changed(path, value))


@pytest.mark.parametrize("name", ["schema", "machine", "made", "command", "rows"])
def test_a_part_that_is_missing_is_named(name: str) -> None:
    measured = document()
    del measured[name]
    with pytest.raises(TableError, match=f"the table has no {name}, needs an object with schema"):
        Table.from_dict(measured)


@pytest.mark.parametrize("value", [None, [], "table", 5, True])
def test_what_is_no_object_is_no_table(value: Any) -> None:
    with pytest.raises(TableError, match=r"the table is .*, needs an object"):
        Table.from_dict(value)


def test_a_table_that_is_made_in_python_is_checked_too() -> None:
    with pytest.raises(TableError, match=r"rows\[1\].us.acme.a is nan"):
        table(point(64, 1, 10), point(64, 2, 10, a=math.nan))
    with pytest.raises(ConfigError, match=r"rows\[1\] measures 'all_reduce, .*' a second time"):
        table(point(64, 1, 10), point(64, 1, 11))


def test_the_table_keeps_nothing_of_the_document() -> None:
    measured = document()
    made = Table.from_dict(measured)
    whole = copy.deepcopy(made.to_dict())
    measured["rows"][0]["us"][UNFUSED] = 1.0
    measured["machine"]["versions"]["torch"] = "9"
    assert made.to_dict() == whole


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([1, 8, 8192, UNFUSED]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_any_change_of_a_document_is_either_taken_as_it_is_or_refused(data: Any) -> None:
    whole: Any = document()
    for _ in range(data.draw(st.integers(1, 2))):
        parent, key, found = None, None, whole
        while isinstance(found, dict | list) and found and (parent is None or data.draw(st.booleans())):
            parent, key = (
                found,
                data.draw(st.sampled_from(sorted(found) if isinstance(found, dict) else range(len(found)))),
            )
            found = found[key]
        if parent is None:
            break
        change = data.draw(st.sampled_from(["replace", "delete", "copy", "add"]))
        if change == "delete":
            del parent[key]
        elif change == "copy" and isinstance(parent, list):
            parent.append(copy.deepcopy(found))
        elif change == "add" and isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8))] = data.draw(JSON)
        else:
            parent[key] = data.draw(JSON)
    try:
        loaded = Table.from_dict(whole)
    except TableError as error:
        str(error).encode()  # raises where the message cannot be printed
        return
    assert loaded.to_dict() == whole
    assert loaded.fingerprint
