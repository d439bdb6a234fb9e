"""Every decision as a value, as text, as JSON, as an HTML page, and saved next to the compile cache."""

from fusion_core.report.record import Merge, Outcome, SiteReport
from fusion_core.report.report import Report

__all__ = ["Merge", "Outcome", "Report", "SiteReport"]
