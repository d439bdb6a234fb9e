"""What has no figure, as a person reads it: by reasons, not by paths."""

from fusion_core.cli.tune_text import notes
from fusion_core.tables.schema import UNFUSED
from fusion_core.tune.sweep import Note


def few_rows(path, pattern, tokens=(1, 2)):
    return [
        Note(pattern, hidden, count, path, f"x has {count} rows, needs more than the 2 ranks")
        for hidden in (64, 128)
        for count in tokens
    ]


def test_one_reason_of_many_paths_is_one_line():
    found = [note for name in "abcd" for note in few_rows(f"acme.{name}", name)]
    where = "hidden 64, 128, tokens 1, 2"
    assert list(notes(found)) == [
        f"no figure of acme.a, acme.b and 2 more for a, b and 2 more at {where}: "
        "x has 1 rows, needs more than the 2 ranks"
    ]


def test_two_reasons_of_one_path_are_two_lines_each_with_its_own_places():
    found = [*few_rows("acme.a", "p"), Note("p", 128, 4096, "acme.a", "x has 128 MiB, needs at most 64 MiB")]
    assert list(notes(found)) == [
        "no figure of acme.a for p at hidden 64, 128, tokens 1, 2: x has 1 rows, needs more than the 2 ranks",
        "no figure of acme.a for p at hidden 128, tokens 4096: x has 128 MiB, needs at most 64 MiB",
    ]


def test_the_same_reason_elsewhere_is_another_line():
    found = few_rows("acme.a", "p") + few_rows("acme.b", "p", (1,))
    lines = list(notes(found))
    assert [line.split(" for ")[0] for line in lines] == ["no figure of acme.a", "no figure of acme.b"]


def test_a_point_without_any_figure_names_no_path():
    found = [Note(pattern, 64, 8, UNFUSED, "the time of 9 s is over") for pattern in ("p", "q")]
    assert list(notes(found)) == ["no figures for p, q at hidden 64, tokens 8: the time of 9 s is over"]
