"""Models that norm queries and keys over all heads: what is left of the all_gathers of queries, keys and values.

By all of Inductor, on 2 and 4 ranks. `make test` has such layers (`tests/sharded`) and OLMo 2 (`test_families.py`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models.architectures import LAYERS, save
from tests.models.calls import Setting
from tests.models.conftest import TIMEOUT
from tests.models.jobs import Start, start

pytestmark = pytest.mark.nightly

NAMES = ("olmo2", "olmo3", "flex_olmo", "minimax_m2", "olmoe")
STATIC = Setting(dynamic=False, cached=False, mode="no_grad")
DYNAMIC = Setting(dynamic=True, cached=False, mode="inference_mode")
RUNS = [(torch.bfloat16, STATIC), (torch.float32, DYNAMIC)]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def started(ranks: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Start]]]:
    """What the ranks of a process start found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}
    found: dict[tuple[str, torch.dtype], list[Start]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        with WorkerPool(ranks, timeout=TIMEOUT) as pool:

            def get(name: str, dtype: torch.dtype, setting: Setting) -> list[Start]:
                if (name, dtype) not in found:
                    made.setdefault(name, save(name, folder, **HEADS))
                    found[name, dtype] = pool.run(start, made[name], dtype, setting)
                return found[name, dtype]

            yield get


@pytest.mark.parametrize(("dtype", "setting"), RUNS, ids=lambda each: str(each).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_queries_keys_and_values_are_not_gathered(
    started: Callable[..., list[Start]], name: str, dtype: torch.dtype, setting: Setting
) -> None:
    for run in started(name, dtype, setting):
        calls = 2 if setting.dynamic else 1
        assert run.passes == 1
        outcome = run.outcome
        assert outcome.unfused["all_gather"] == (3 * LAYERS + 1) * calls
        assert outcome.fused["all_gather"] == calls  # that of the vocabulary's logits
        assert outcome.fused["all_reduce"] == outcome.unfused["all_reduce"] + LAYERS * calls
        parts = [site["attributes"] for site in run.sites if site["collective"] == "all_gather"]
        assert len(parts) == 2 * LAYERS
        gathered, sent = (sum(part[kind] for part in parts) for kind in ("gathered_bytes", "sent_bytes"))
        assert sent * 10 <= gathered


@pytest.mark.parametrize(("dtype", "setting"), RUNS, ids=lambda each: str(each).removeprefix("torch."))
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_no_further_from_float64_than_without_fusion(
    started: Callable[..., list[Start]], name: str, dtype: torch.dtype, setting: Setting
) -> None:
    for run in started(name, dtype, setting):
        outcome = run.outcome
        assert outcome.finite
        rounding = torch.finfo(dtype).eps * torch.cat([each.flatten() for each in run.logits]).square().mean().sqrt()
        assert outcome.fused_rms <= outcome.unfused_rms + float(rounding)
