import math

from fusion_core.bench.result import Fusion, Outcome
from fusion_core.cli import bench_text as text
from fusion_core.cli.output import show
from tests.benching.rows import row


def outcome(*rows, left_out=(), device="cuda"):
    return Outcome(rows, left_out, "reduce-overhead", device)


def grid(capsys, *rows):
    show(text.grid(outcome(*rows)))
    return capsys.readouterr().out.splitlines()[1:]


def test_a_line_has_everything(capsys):
    (line,) = grid(capsys, row())
    assert line.split() == ["8", "115.0", "100.0", "1.150×", "1.100–1.200", "8", "of", "8", "acme.one_shot", "0.0100"]


def test_several_strategies_are_counted(capsys):
    fusion = Fusion(8, 7, {"a.x": 6, "b.y": 1}, (), ())
    lines = grid(capsys, row(fusion=fusion, batch=None), row(fusion=Fusion(8, 0, {}, (), ())))
    assert "7 of 8       a.x ×6, b.y ×1" in lines[0]
    assert lines[0].lstrip().startswith("–")
    assert "0 of 8       none" in lines[1]


def test_a_difference_that_is_none(capsys):
    lines = grid(capsys, row(difference=None), row(difference=math.inf))
    assert lines[0].endswith("not compared")
    assert lines[1].endswith("not finite")


def test_drawing():
    drawn = text.drawing(outcome(row(), row(batch=128, plain_us=(90.0,), fused_us=(100.0,))), ascii_only=True)
    first, second = drawn.splitlines()[-2:]
    assert first.index("|") == second.index("|")
    assert "|####" in first
    assert "#|" in second
    assert first.endswith("1.150x")
    assert drawn.isascii()


def notes(*rows, dynamic=False, **more):
    return list(text.notes(outcome(*rows, **more), dynamic, 60.0))


def test_nothing_to_note():
    assert notes(row(), row(batch=32)) == []


def test_notes():
    fell_back = Fusion(8, 7, {"a.x": 7}, ("a.y: no memory is left, needs more",), ())
    assert notes(row(fusion=fell_back)) == [
        "batch 8: a.y: no memory is left, needs more",
        "not every site was fused: --json has the reports with the reasons, fusion-core explain shows one",
    ]
    assert "CUDA graphs were skipped 3 times" in notes(row(cudagraph_skips=3))[0]
    assert "no all_reduce in the graph" in notes(row(fusion=Fusion(0, 0, {}, (), ())))[0]
    assert "times on a CPU" in notes(row(), device="cpu")[0]
    assert notes(row(), left_out=(32, 128)) == ["left out, as --budget 60 had no time for it: batch 32, 128"]
    assert notes(row(batch=1), row(batch=8), row(batch=32, new_graph=False), dynamic=True)[0].startswith(
        "another graph was compiled for batch 8:"
    )
