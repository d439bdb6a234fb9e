"""Leaves the slow rows out of ordinary runs; with ``--campaign`` runs all rows and prints the table of verdicts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.support.device import BACKEND


@pytest.fixture
def one_rank() -> Iterator[str]:
    """A group of one rank for one row: other rows run commands that must find no group."""
    torch.distributed.init_process_group(BACKEND, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[WorkerPool]:
    """Two real ranks, for all rows that need them."""
    with WorkerPool(2) as pool:
        yield pool


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--campaign"):
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    items[:] = [item for item in items if not item.get_closest_marker("campaign")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--campaign"):
        return
    rows = [
        (report.outcome, *value)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        for key, value in report.user_properties
        if key == "fault"
    ]
    terminalreporter.section(f"{len(rows)} faults")
    for outcome, area, name, fault, verdict in sorted(rows, key=lambda row: row[1:3]):
        terminalreporter.write_line(f"{outcome:6}  {area}: {name} | {fault} | {verdict}")
