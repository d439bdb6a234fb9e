"""Every decision about one graph, as text, as JSON and as a page."""

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
        failures: Backends that failed to load, as text.
        unavailable: Backends that cannot be used on this device → why.
        device: The device that the decisions were made for.
        order: The backends that were asked, best first.
        origin: ``"compiled"``, ``"explained"`` (a dry run), or ``"cache"``: the graph came from the compile cache and
            the pass did not run; this is what it recorded when the graph was compiled.
        compiled_at: When the pass ran, as an ISO time in UTC.
        versions: Of torch and fusion_core at that time.
        merges: All_reduces whose results are added together: made one, or why not.
        disagreements: Process groups whose ranks differ → in what, and what is not used there for it.
        tables: Process groups → where the tuning table comes from that decided there.
        untuned: Process groups on GPUs where none did, though the user wants one → why.
    """

    def __str__(self) -> str:
        return report_text.text(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; `from_dict` takes back all but ``run_time``, which is a process's own.

        What many sites share is there once: ``reasons`` holds every reason and ``decisions`` every list of decisions.
        A site's ``decisions`` is the place of its list, whose reasons are places in the site's own ``reasons``, which
        are places in the report's.
        """
        return report_json.to_dict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` gave.

        Raises:
            ValueError: where the form is another version's.
        """
        return cls(**report_json.fields(data))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one self-contained HTML page; an existing file is replaced as a whole."""
        write_whole(Path(path), report_html.page(self))
