"""``torch.compile(model, backend="fusion_core")`` with all of Inductor, in one process start and in the next.

`make test` runs a model so by the README's first program (`tests/test_readme.py`), and compares numbers of all of Inductor
on smaller functions (`tests/corpus/test_explained_is_placed.py`).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models.architectures import LAYERS, SITES
from tests.models.calls import Setting
from tests.models.conftest import assert_answers_are_as_near_to_float64
from tests.models.jobs import Start, start

STATIC = Setting(dynamic=False, cached=False, mode="no_grad")
DYNAMIC = Setting(dynamic=True, cached=False, mode="inference_mode")
RUNS = [
    pytest.param(name, dtype, setting, id=f"{name}-{str(dtype).removeprefix('torch.')}-{setting}", marks=marks)
    for name, dtype, setting, marks in [
        ("llama", torch.bfloat16, STATIC, pytest.mark.nightly),
        ("llama", torch.float32, DYNAMIC, pytest.mark.nightly),  # `test_decode.py` has dynamic shapes
        ("mixtral", torch.bfloat16, STATIC, pytest.mark.nightly),  # `test_families.py` has its sites
    ]
]
Started = Callable[[str, torch.dtype, Setting], list[Start]]


@pytest.fixture(scope="module")
def started(pool: WorkerPool, checkpoint: Callable[[str], Path]) -> Started:
    """What the ranks of the first process start found, by model; runs on first use."""
    found: dict[tuple[str, torch.dtype, Setting], list[Start]] = {}

    def get(name: str, dtype: torch.dtype, setting: Setting) -> list[Start]:
        if (name, dtype, setting) not in found:
            found[name, dtype, setting] = pool.run(start, checkpoint(name), dtype, setting)
        return found[name, dtype, setting]

    return get


@pytest.mark.parametrize(("name", "dtype", "setting"), RUNS)
def test_every_chain_is_fused_by_the_public_backend(started: Started, name: str, dtype: torch.dtype, setting: Setting):
    for rank in started(name, dtype, setting):
        assert rank.origin == "compiled"
        assert rank.passes == 1
        assert [site["pattern"] for site in rank.sites] == ["all_reduce_rms_norm"] + 2 * LAYERS * [
            "all_reduce_add_rms_norm"
        ]
        assert all(site["strategy"] for site in rank.sites)


@pytest.mark.parametrize(("name", "dtype", "setting"), RUNS)
def test_compiled_answers_are_as_near_to_the_truth(started: Started, name: str, dtype: torch.dtype, setting: Setting):
    assert_answers_are_as_near_to_float64(started(name, dtype, setting)[0].outcome, dtype)


@pytest.mark.parametrize(("name", "dtype", "setting"), RUNS)
def test_compiled_code_reduces_as_often_as_without_fusion(
    started: Started, name: str, dtype: torch.dtype, setting: Setting
):
    for rank in started(name, dtype, setting):
        steps = len(rank.outcome.compiled_after_call)
        assert rank.outcome.unfused == {"all_reduce": SITES * steps, "all_gather": steps}
        assert rank.outcome.fused == rank.outcome.unfused


@pytest.mark.nightly
def test_compiled_code_takes_another_length_without_a_new_compilation(started: Started):
    for rank in started("llama", torch.float32, DYNAMIC):
        assert rank.outcome.compiled_after_call == [1, 1]


@pytest.mark.nightly  # of one site: the campaign's "caches" and `test_compile.py`
def test_a_second_process_start_shows_what_the_first_recorded(
    workers: Callable[[], WorkerPool], checkpoint: Callable[[str], Path]
):
    job = checkpoint("llama"), torch.bfloat16, STATIC, True
    with workers() as pool:
        first = pool.run(start, *job)
    with workers() as pool:
        second = pool.run(start, *job)
    for before, now in zip(first, second, strict=True):
        assert sum(now.cache_hits.values()) > 0, "the graph did not come from Inductor's cache"
        assert now.passes == 0
        assert now.origin == "cache"
        assert "from the compile cache, as recorded when it was compiled at" in now.text
        assert f"0 of {SITES} all_reduces on a kernel, {SITES} as before (reference)," in now.text
        assert len([site for site in now.sites if site["strategy"]]) == SITES
        assert now.sites == before.sites
        assert all(torch.equal(a, b) for a, b in zip(before.logits, now.logits, strict=True))
        assert now.outcome.fused == before.outcome.fused == {"all_reduce": SITES}
