"""docs/rocm.md names tests that there are."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = (FOLDER.parents[1] / "docs" / "rocm.md").read_text(encoding="utf-8")


def test_every_problem_on_the_page_has_tests_and_they_exist():
    rows = [line for line in PAGE.partition("## Reported problems")[2].splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 14
    written = set(re.findall(r"^def (test_\w+)", "".join(p.read_text("utf-8") for p in FOLDER.glob("test_*.py")), re.M))
    for row in rows:
        named = set(re.findall(r"`(test_\w+)`", row.split("|")[-2]))
        assert named, row
        assert named <= written, named - written
