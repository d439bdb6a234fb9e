"""The measurements of ``fusion-core demo`` and its verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fusion_core.cli.demo_job import Run
from fusion_core.report.report import Report

TOLERANCE = 1.2
"""The fused model's error against float64 may be this many times the unfused one's, as rounding differs."""


@dataclass(frozen=True)
class Setup:
    """The model and the process group of the run."""

    layers: int
    world_size: int
    dtype: str
    parameters: int


@dataclass(frozen=True)
class Measured:
    """One run, compared with float64."""

    fused: int
    compile_seconds: float
    call_seconds: float
    collectives: dict[str, int]
    largest_error: float
    relative_error: float

    @classmethod
    def of(cls, run: Run, exact: torch.Tensor) -> Measured:
        """The measurements of a run; ``exact`` contains the logits in float64."""
        error = run.logits.double() - exact
        return cls(
            sum(site["strategy"] is not None for report in run.reports for site in report["sites"]),
            run.compile_seconds,
            run.call_seconds,
            run.collectives,
            error.abs().max().item(),
            (error.norm() / exact.norm()).item(),
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON types."""
        return {
            "fused_sites": self.fused,
            "collectives": self.collectives,
            "compile_seconds": round(self.compile_seconds, 3),
            "call_seconds": round(self.call_seconds, 6),
            "max_abs_error": self.largest_error,
            "relative_l2_error": self.relative_error,
        }


@dataclass(frozen=True)
class Result:
    """All results of the demo."""

    setup: Setup
    unfused: Measured
    fused: Measured
    largest_difference: float
    largest_logit: float
    reports: tuple[Report, ...]

    @classmethod
    def of(cls, setup: Setup, unfused: Run, fused: Run, exact: torch.Tensor) -> Result:
        """The result of the two runs."""
        return cls(
            setup,
            Measured.of(unfused, exact),
            Measured.of(fused, exact),
            (fused.logits - unfused.logits).abs().max().item(),
            exact.abs().max().item(),
            tuple(Report.from_dict(report) for report in fused.reports),
        )

    @property
    def needed(self) -> int:
        """The number of all_reduces in the model, each of which must be fused.

        One after each attention and each MLP, and one more if this version of transformers shards the embedding.
        """
        return max(2 * self.setup.layers, self.unfused.collectives.get("allreduce", 0))

    @property
    def problems(self) -> tuple[str, ...]:
        """Why the demo failed; empty if it passed. A NaN counts as a problem."""
        found = []
        if self.fused.fused < self.needed:
            found.append(f"{self.fused.fused} all_reduces were recognised, needs {self.needed}")
        limit = TOLERANCE * self.unfused.relative_error
        if not self.fused.relative_error <= limit:
            found.append(f"the fused model is {self.fused.relative_error:.3g} from float64, needs at most {limit:.3g}")
        if self.fused.collectives != self.unfused.collectives:
            needs = f"{counts(self.unfused.collectives)}, as without fusion"
            found.append(f"the process group got {counts(self.fused.collectives)}, needs {needs}")
        return tuple(found)

    def verdict(self) -> str:
        """The last line."""
        if self.problems:
            return f"not as it should be: {'; '.join(self.problems)}"
        return (
            f"as it should be: {self.fused.fused} of {self.needed} all_reduces recognised, "
            f"at most {TOLERANCE} times as far from float64 as unfused, the same collectives"
        )

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {
            "layers": self.setup.layers,
            "world_size": self.setup.world_size,
            "dtype": self.setup.dtype,
            "parameters": self.setup.parameters,
            "needed_sites": self.needed,
            "unfused": self.unfused.to_dict(),
            "fused": self.fused.to_dict(),
            "largest_difference": self.largest_difference,
            "largest_logit": self.largest_logit,
            "reports": [report.to_dict() for report in self.reports],
            "ok": not self.problems,
            "problems": list(self.problems),
        }


def counts(collectives: dict[str, int]) -> str:
    """Collectives as text: ``9 allreduce, 1 allgather``."""
    return ", ".join(f"{count} {name}" for name, count in collectives.items()) or "no collective"
