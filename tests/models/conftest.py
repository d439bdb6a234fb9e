"""Two processes, small checkpoints, and what the workers found, each made once."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models import architectures, jobs

RANKS = 2
TIMEOUT = 540.0  # seconds for one call of a worker; the longest takes some 60 on a machine of its own


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], WorkerPool]]:
    """Starts pools of fresh processes that share an Inductor cache which nobody filled before."""
    pools: list[WorkerPool] = []

    def start() -> WorkerPool:
        pools.append(WorkerPool(RANKS, timeout=TIMEOUT))
        return pools[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in [name for name in os.environ if name.startswith("FUSION_CORE_")]:
            patch.delenv(name)
        yield start
        for pool in pools:
            pool.close()


@pytest.fixture(scope="session")
def pool(workers: Callable[[], WorkerPool]) -> WorkerPool:
    return workers()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an architecture's checkpoint, written on first use."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = architectures.save(name, folder)
        return made[name]

    return get


def assert_answers_are_as_near_to_float64(outcome: jobs.Outcome, dtype: torch.dtype, factor: float = 1.2) -> None:
    """That a fused run's logits are real ones, and about as near to float64 as the unfused run's."""
    assert outcome.finite, "logits are not finite"
    assert outcome.dead_rows == 0, f"{outcome.dead_rows} tokens have logits that are all zero"
    assert outcome.magnitude > 0.5, f"the largest logit of a token is {outcome.magnitude:.2g}: an error would drown"
    # In float32 both errors are some ulps of the logits, and a factor of two ulps is two ulps: a few more may be chance.
    few_ulps = 4 * torch.finfo(dtype).eps * outcome.magnitude if dtype == torch.float32 else 0.0
    allowed = factor * outcome.unfused_error + few_ulps
    assert outcome.fused_error <= allowed, (
        f"fused is {outcome.fused_error:.3g} off, unfused {outcome.unfused_error:.3g}"
    )
    assert outcome.unfused_error < 0.1 * outcome.magnitude, "the unfused run is wrong itself"
