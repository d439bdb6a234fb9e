"""What operators did when they ran, in reports that were made before."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fusion_core import BackendError, Reason, Report, SiteReport, fallback, fell_back
from fusion_core.fallback import fallen_back

NO_MEMORY = Reason("memory", "4 MiB are left", "64 MiB for a workspace")
WRONG = Reason("self-check", "the kernel gave <NaN>")


@pytest.fixture(autouse=True)
def _nothing_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_fallen_back", {})


def site(node: str, strategy: str | None = "acme.add", group: str = "0") -> SiteReport:
    attributes = {"inputs": {"x": "bfloat16[4, 64]"}, "live": {}, "group": group, "world_size": 2}
    return SiteReport("all_reduce", strategy, node, attributes, ())


def report() -> Report:
    sites = (site("first"), site("second"), site("other_group", group="1"), site("other", "acme.mul"), site("no", None))
    return Report(
        sites=(*sites, SiteReport("all_reduce", None, "bare", {}, ())), device="cuda (sm_90)", order=("acme",)
    )


def test_a_report_shows_what_happened_after_it_was_made() -> None:
    made = report()
    before = str(made)
    assert "at run time" not in before
    fell_back("acme.add", "0", NO_MEMORY)
    fell_back("acme.add", "0", WRONG)
    said = [line for line in str(made).splitlines() if line not in before.splitlines()]
    assert said == [
        "fusion_core: 2 of 6 all_reduces on a kernel, 2 unfused at run time, 2 refused, on cuda (sm_90)",
        "at run time:",
        "  acme.add runs unfused: 4 MiB are left, needs 64 MiB for a workspace (at first, second)",
        "  acme.add runs unfused: the kernel gave <NaN> (at first, second)",
    ]
    assert [len(each.run_time) for each in made.sites] == [2, 2, 0, 0, 0, 0]


def test_a_reason_is_kept_once_for_each_strategy_and_group() -> None:
    for group in ("0", "0", "1"):
        fell_back("acme.add", group, NO_MEMORY)
    assert fallen_back("acme.add", "0") == fallen_back("acme.add", "1") == (NO_MEMORY,)
    assert fallen_back("acme.mul", "0") == ()


def test_a_reason_is_kept_once_when_ranks_are_threads() -> None:
    start = threading.Barrier(8)

    def rank() -> None:
        start.wait()
        for number in range(200):
            fell_back("acme.add", "0", Reason("call", f"call {number}"))

    threads = [threading.Thread(target=rank) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fallen_back("acme.add", "0")) == len(set(fallen_back("acme.add", "0"))) == 200


def test_the_plain_form_has_it_and_a_report_that_comes_back_looks_for_itself(monkeypatch: Any) -> None:
    fell_back("acme.add", "0", NO_MEMORY)
    data = json.loads(json.dumps(report().to_dict()))
    assert [each["run_time"] for each in data["sites"]] == [[NO_MEMORY.to_dict()]] * 2 + [[]] * 4
    assert Report.from_dict(data).sites[0].run_time == (NO_MEMORY,)
    monkeypatch.setattr(fallback, "_fallen_back", {})  # as in another process
    assert Report.from_dict(data).sites[0].run_time == ()


def test_the_page_shows_it_escaped(tmp_path: Path) -> None:
    def page() -> str:
        report().to_html(tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    assert "runs unfused" not in page()
    fell_back("acme.add", "0", WRONG)
    assert page().count('<b class="unfused">acme.add runs unfused</b>') == 2
    assert page().count("<p>at run time: the kernel gave &lt;NaN&gt;</p>") == 2


def test_what_is_no_reason_is_an_error() -> None:
    with pytest.raises(BackendError, match=r"fell_back of 'acme\.add' got 'no memory', needs a Reason"):
        fell_back("acme.add", "0", "no memory")  # type: ignore[arg-type]
