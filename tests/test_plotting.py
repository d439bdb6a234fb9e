import importlib.util
import re

import pytest

from fusion_core import ConfigError
from fusion_core.cli import plotting
from fusion_core.cli.plotting import Bar, Line, Panel, bars, check_can_save, save, svg


def drawn(*rows, **more):
    return bars([Bar(*row) for row in rows], 1.0, **{"ascii_only": True, "width": 21, **more}).splitlines()


def test_bars_leave_the_base_on_both_sides():
    assert drawn(("8", 1.2, 1.1, 1.2, "up"), ("16", 0.8, 0.8, 0.9, "down"), ("32", 1.0, 1.0, 1.0, "")) == [
        " 8            |#####=====  up",
        "16  =====#####|            down",
        "32            |",
    ]


def test_a_range_goes_beyond_the_value_and_may_cross_the_base():
    assert drawn(("", 1.1, 0.95, 1.2, "")) == ["  ----|========--------"]
    assert drawn(("", 0.9, 0.8, 1.05, "")) == ["  --------========|----"]


def test_noise_does_not_fill_the_screen():
    (line,) = drawn(("", 1.001, 0.999, 1.002, ""), width=61)
    assert len(line) < 10


def test_blocks():
    (line,) = drawn(("", 1.2, 1.1, 1.3, ""), ascii_only=False)
    assert set(line) == set(" │█▓▒")
    assert drawn(("", 1.2, 1.1, 1.3, ""))[0].isascii()


def test_no_rows():
    assert drawn() == []


PANEL = Panel("2 GPUs", "tokens", "gain", [Line("a", [(1, 1.2), (8, 1.1)], [(1.1, 1.3), (1.0, 1.2)])], base=1.0)


def test_svg_is_the_same_for_the_same_numbers_and_its_text_is_text():
    one = svg("a title", [PANEL, PANEL])
    assert one == svg("a title", [PANEL, PANEL])
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", one)
    assert {"a title", "2 GPUs", "tokens", "gain", "1", "8"} <= set(texts)


def test_lines_have_a_legend_where_there_are_several():
    two = Panel("", "x", "y", [Line("first", [(1, 1)]), Line("second", [(2, 2)])], log_y=True)
    assert "first" in svg("", [two])
    assert "first" not in svg("", [Panel("", "x", "y", two.lines[:1])])


def test_a_file_is_written(tmp_path):
    save(tmp_path / "gain.svg", "t", [PANEL])
    assert [each.name for each in tmp_path.iterdir()] == ["gain.svg"]


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"needs a file name that ends in \.svg"):
        check_can_save(tmp_path / "gain.png")
    with pytest.raises(ConfigError, match="in a folder that does not exist"):
        check_can_save(tmp_path / "none" / "gain.svg")
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        save(tmp_path / "taken.svg", "t", [PANEL])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"matplotlib is not installed, needs the plot extra; pip install 'fusion-core\[plot\]'"
    ):
        plotting.check_can_save(tmp_path / "gain.svg")
