"""Worker pools that live as long as the session, and what the examples cost."""

import collections
import time
from collections.abc import Iterator

import pytest

from fusion_core.workers import WorkerPool


class Pools:
    """One pool for each world size, started when it is first needed."""

    def __init__(self) -> None:
        self.pools: dict[int, WorkerPool] = {}
        self.costs: dict[str, list[float]] = collections.defaultdict(list)

    def run(self, world_size: int, function, *args):
        """Run an example on every rank, and keep the time."""
        pool = self.pools.setdefault(world_size, WorkerPool(world_size, timeout=180.0))
        start = time.perf_counter()
        results = pool.run(function, *args)
        self.costs[function.__name__].append(time.perf_counter() - start)
        return results

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


_pools = Pools()


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    yield _pools
    _pools.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, costs in _pools.costs.items():
        total = sum(costs)
        terminalreporter.write_line(
            f"{name}: {len(costs)} examples in {total:.0f} s, {len(costs) / total:.1f} per second"
        )
