"""Nothing chosen, nothing changed: on the graph of a real model, node for node."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models.calls import Setting
from tests.models.untouched_jobs import described

pytestmark = pytest.mark.nightly  # of generated graphs: `tests/properties`

NOTHING_CHOSEN = ("limit=0", "order=()", "every backend refuses")


@pytest.fixture(scope="module", params=["static", "dynamic"])
def graphs(request: pytest.FixtureRequest, pool: WorkerPool, checkpoint: Callable[[str], Path]) -> dict[str, list[str]]:
    setting = Setting(dynamic=request.param == "dynamic", cached=False, mode="no_grad")
    return pool.run(described, checkpoint("llama"), torch.bfloat16, setting)[0]


@pytest.mark.parametrize("case", NOTHING_CHOSEN)
def test_a_model_without_a_chosen_site_compiles_as_if_fusion_core_were_not_there(
    graphs: dict[str, list[str]], case: str
):
    assert len(graphs["without fusion_core"]) > 200
    assert graphs[case] == graphs["without fusion_core"]


def test_the_comparison_sees_a_chosen_site(graphs: dict[str, list[str]]):
    assert graphs["reference"] != graphs["without fusion_core"]
