"""Every decision about one graph, as text, as JSON and as an HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion_core._files import write_whole
from fusion_core.report import html as report_html
from fusion_core.report import json_form as report_json
from fusion_core.report import text as report_text
from fusion_core.report.record import Merge, Outcome, Record, SiteReport

__all__ = ["Merge", "Outcome", "Report", "SiteReport"]


class Report(Record):
    """Every decision about one graph.

    Attributes:
        sites: One for each all_reduce of the graph, fused or not, in graph order.
        failures: The errors of backends that failed to load.
        unavailable: Backends that cannot be used on this device → the reasons.
        device: The device that the decisions were made for.
        order: The backends that were considered, best first.
        origin: ``"compiled"``, ``"explained"`` (a dry run), or ``"cache"``: the graph came from the compile cache and
            the pass did not run; the report is the one saved when the graph was compiled.
        compiled_at: When the pass ran, as an ISO time in UTC.
        versions: Versions of torch and fusion_core at that time.
        merges: All_reduces whose results are added together: merged, or the reasons why not.
        disagreements: Process groups whose ranks differ → what differs, and what is therefore not used there.
        tables: Process groups → the source of the tuning table that decided there.
        untuned: Process groups on GPUs where a table was wanted but none was used → the reasons.
    """

    def __str__(self) -> str:
        return report_text.text(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; `from_dict` reads everything except ``run_time``, which belongs to a process.

        Data that sites share is written once: ``reasons`` contains every reason and ``decisions`` every list of
        decisions. A site's ``decisions`` is the index of its list. The reasons in that list are indices into the
        site's ``reasons``, which are indices into the report's.
        """
        return report_json.to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report from `to_dict`'s result.

        Raises:
            ValueError: The data has another version's schema.
        """
        return cls(**report_json.fields(data))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one self-contained HTML page; an existing file is replaced as a whole."""
        write_whole(Path(path), report_html.page(self))
