"""What is measured in which order, what is dropped, and what the time does not allow; with made-up and recorded times."""

from pathlib import Path

import pytest

from fusion_core.tables import Machine, Table
from fusion_core.tables.store import read
from fusion_core.tune.measure import Measured
from fusion_core.tune.sweep import sweep

RECORDED = {ranks: read(Path(__file__).parent / f"h200x{ranks}.json") for ranks in (2, 4)}
PATTERN = "all_reduce_add_rms_norm"
TOKENS = (1, 2, 4, 8)


class Alone:
    def broadcast(self, value):
        return value


class Bench:
    """Times by a function of the path and the tokens; takes a second a point."""

    def __init__(self, times, seconds=1.0, fails=()):
        self.times, self.seconds, self.fails = times, seconds, fails
        self.asked, self.now = [], 0.0

    def __call__(self, pattern, hidden, tokens, without):
        self.now += self.seconds
        self.asked.append((pattern, hidden, tokens))
        if (pattern, hidden, tokens) in self.fails:
            return Measured({}, {"unfused": "rank 0: no memory is left"})
        us = {name: of(tokens) for name, of in self.times.items() if name not in without}
        return Measured({name: time for name, time in us.items() if time is not None}, {})


def swept(bench, patterns=(PATTERN,), hidden=(64,), tokens=TOKENS, budget=1e9, ranks=None, progress=lambda *_: None):
    clock = lambda: bench.now  # noqa: E731
    found = sweep(patterns, hidden, tokens, "bfloat16", bench, ranks or Alone(), budget, progress, clock)
    Table(Machine("Acme 9000", world_size=2), found.rows, "2026-11-22T10:00:00+00:00", "")  # a table takes them
    return found


def flat(us):
    return lambda tokens: us


def points(found):
    return [(row.pattern, row.hidden, row.tokens) for row in found.rows]


def test_whole_blocks_in_order():
    bench, told = Bench({"unfused": flat(10.0), "acme.sum": flat(5.0)}), []
    found = swept(bench, ("b", "a"), (64, 32), (1, 8), progress=lambda done, what: told.append((done, what)))
    order = [(pattern, hidden, tokens) for pattern in "ba" for hidden in (64, 32) for tokens in (1, 8)]
    assert bench.asked == points(found) == order
    assert found.notes == ()
    assert found.rows[0].us == {"unfused": 10.0, "acme.sum": 5.0}
    assert found.rows[0].dtype == "bfloat16"
    assert told[0] == (0, "b, hidden 64, tokens 1")
    assert told[-1] == (8, "done")


# dropping


def slow(tokens):
    """Bound by its size, and three times as long as `quick`."""
    return 30.0 * tokens


def quick(tokens):
    return 10.0 * tokens


def test_a_hopeless_base_line_keeps_its_times():
    """Without them strategies would be compared with torch's."""
    own = "unfused acme::all_reduce"
    bench = Bench({"unfused": lambda n: 100.0 * n, own: lambda n: 100.0 * n, "acme.sum": lambda n: 10.0 * n})
    assert all(own in row.us for row in swept(bench).rows)


def test_a_hopeless_path_is_dropped_and_said():
    found = swept(Bench({"unfused": quick, "acme.slow": slow}), tokens=(1, 2, 4, 8))
    assert [row.us.keys() for row in found.rows] == [{"unfused", "acme.slow"}] * 2 + [{"unfused"}] * 2
    assert [(note.tokens, note.path) for note in found.notes] == [(4, "acme.slow"), (8, "acme.slow")]
    assert "at 1 and 2 tokens it took 3.0 and 3.0 times as long" in found.notes[0].why


@pytest.mark.parametrize(
    "times",
    [
        {"unfused": quick, "acme.sum": lambda tokens: 29.0 * tokens},  # not far enough behind
        {"unfused": flat(10.0), "acme.two_shot": flat(40.0)},  # bound by its launch
        {"unfused": quick, "acme.sum": lambda tokens: 80.0 * tokens**0.7},  # far behind, and catching up
        {"unfused": slow, "acme.sum": quick},  # the unfused path is what the others are compared with
        {"unfused": quick, "acme.sum": lambda tokens: slow(tokens) if tokens > 1 else 29.0},  # far behind once
        {"unfused": quick, "acme.sum": lambda tokens: slow(tokens) if tokens > 1 else None},  # it ran once
    ],
    ids=["near", "launch", "catching up", "unfused", "once", "ran once"],
)
def test_what_may_still_win_is_not_dropped(times):
    found = swept(Bench(times), tokens=(1, 2, 3))
    assert [row.tokens for row in found.rows] == [1, 2, 3]
    assert found.rows[-1].us.keys() == times.keys()


@pytest.mark.parametrize("ranks", RECORDED)
def test_nothing_that_is_the_fastest_anywhere_is_dropped_before(ranks):
    rows = {row.tokens: row.us for row in RECORDED[ranks].rows}
    names = {name for us in rows.values() for name in us}
    bench = Bench({name: lambda tokens, name=name: rows[tokens].get(name) for name in names})
    found = swept(bench, tokens=tuple(sorted(rows)))
    for row in found.rows:
        assert min(row.us.values()) == min(rows[row.tokens].values())


# time


def test_what_the_time_does_not_allow_is_named():
    bench = Bench({"unfused": flat(10.0)})
    found = swept(bench, ("a", "b"), (64, 32), budget=9.5)
    # two blocks take 4 s each; a third would end after 12 s and is not begun
    assert len(bench.asked) == 8
    assert points(found) == bench.asked
    assert {(note.pattern, note.hidden) for note in found.notes} == {("b", 64), ("b", 32)}
    assert len(found.notes) == 8
    assert found.notes[0].why == "the time of 9.5 s is over"


def test_a_block_that_breaks_off_is_left_out_of_the_table_and_named():
    class Slower(Bench):
        def __call__(self, pattern, hidden, tokens, without):
            self.seconds = 1.0 if hidden == 64 else 3.0
            return super().__call__(pattern, hidden, tokens, without)

    found = swept(Slower({"unfused": flat(10.0)}), ("a",), (64, 32), budget=8.5)
    assert points(found) == [("a", 64, tokens) for tokens in TOKENS]
    whys = {note.tokens: note.why for note in found.notes}
    assert whys[8] == "the time of 8.5 s is over"
    assert whys[1] == "measured, and left out: every hidden size of a pattern needs the same token counts"


def test_the_only_block_of_a_pattern_keeps_what_it_has():
    found = swept(Bench({"unfused": flat(10.0)}), budget=1.5)
    assert points(found) == [(PATTERN, 64, 1), (PATTERN, 64, 2)]
    assert [note.tokens for note in found.notes] == [4, 8]


def test_rank_0_alone_decides_whether_there_is_time():
    asked = []

    class Other:
        """Another rank, whose clock says that the time is over."""

        def broadcast(self, value):
            asked.append(value)
            return False

    bench = Bench({"unfused": flat(10.0)})
    assert len(swept(bench, budget=0.5, ranks=Other()).rows) == 4
    assert asked == [False, False, True, True, True]


# failures


def test_behind_a_size_that_fails_no_larger_one_is_begun():
    bench = Bench({"unfused": flat(10.0)}, fails={("a", 64, 4)})
    found = swept(bench, ("a", "b"), (64,))
    assert bench.asked == [("a", 64, 1), ("a", 64, 2), ("a", 64, 4), *[("b", 64, tokens) for tokens in TOKENS]]
    notes = [(note.tokens, note.why) for note in found.notes]
    assert notes == [(4, "rank 0: no memory is left"), (8, "not begun after 4 tokens failed")]


@pytest.mark.parametrize(("fails", "kept"), [(8, {64: [1, 2, 4], 32: [1, 2, 4]}), (2, {32: [1, 2, 4, 8]})])
def test_the_most_points_that_a_table_takes_are_kept(fails, kept):
    """Every hidden size of a pattern has the same token counts."""
    found = swept(Bench({"unfused": flat(10.0)}, fails={("a", 64, fails)}), ("a",), (64, 32))
    by_hidden = {}
    for row in found.rows:
        by_hidden.setdefault(row.hidden, []).append(row.tokens)
    assert by_hidden == kept


def test_where_nothing_could_be_measured_there_are_no_rows():
    found = swept(Bench({"unfused": flat(10.0)}, fails={(PATTERN, 64, 1)}))
    assert found.rows == ()
    assert [note.path for note in found.notes] == ["unfused"] * 4
