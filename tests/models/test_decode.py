"""Every family, dtype, cache, mode and kind of shape, up to the graph that Inductor would generate code from.

Each graph runs eagerly, with fusion and without: real collectives and numbers, no C++. `make test` runs one family in
one dtype with a cache, under ``dynamic=True``, where each norm's epsilon would be an input of the graph unless the
library made it a number; every family is compiled once more by `test_families.py`, with neither.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusion_core.workers import WorkerPool
from tests.models.architectures import ARCHITECTURES, LAYERS, SITES
from tests.models.calls import Setting
from tests.models.conftest import assert_answers_are_as_near_to_float64
from tests.models.jobs import Outcome, survey

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Every value of every axis meets every value of every other; all eight would take twice the time.
SETTINGS = {
    "bf16": [
        Setting(dynamic=False, cached=False, mode="no_grad"),
        Setting(dynamic=False, cached=True, mode="inference_mode"),
        Setting(dynamic=True, cached=False, mode="inference_mode"),
        Setting(dynamic=True, cached=True, mode="no_grad"),
        Setting(dynamic=True, cached=True, mode="no_grad", marked=False),
    ],
    "fp32": [
        Setting(dynamic=False, cached=True, mode="no_grad"),
        Setting(dynamic=True, cached=False, mode="inference_mode"),
    ],
}
# The README's first program generates with a cache, by all of Inductor; `tests/test_readme.py` runs it.
SOON = Setting(dynamic=True, cached=False, mode="inference_mode")
RUNS = [
    pytest.param(
        name,
        dtype,
        setting,
        id=f"{name}-{dtype}-{setting}",
        marks=[] if (name, dtype) == ("llama", "bf16") and setting == SOON else [pytest.mark.nightly],
    )
    for name in ARCHITECTURES
    for dtype, settings in SETTINGS.items()
    for setting in settings
]
Outcomes = Callable[[str, str, Setting], Outcome]

# What one `residual add -> RMSNorm` of Hugging Face is made of; the embedding's norm has no add. Casts come extra.
PARTS_OF_A_NORM = {
    "_c10d_functional.all_reduce.default": 1,
    "_c10d_functional.wait_tensor.default": 1,
    "aten.pow.Tensor_Scalar": 1,
    "aten.mean.dim": 1,
    "aten.rsqrt.default": 1,
    "aten.mul.Tensor": 2,
    "aten.add.Tensor": 1,
}


@pytest.fixture(scope="module")
def outcome(pool: WorkerPool, checkpoint: Callable[[str], Path]) -> Outcomes:
    """What came of a run on rank 0, on first use."""
    found: dict[tuple[str, str, Setting], Outcome] = {}

    def get(name: str, dtype: str, setting: Setting) -> Outcome:
        if (name, dtype, setting) not in found:
            found[name, dtype, setting] = pool.run(survey, checkpoint(name), DTYPES[dtype], [setting])[0][str(setting)]
        return found[name, dtype, setting]

    return get


@pytest.mark.parametrize(("name", "dtype", "setting"), RUNS)
def test_every_chain_of_the_model_is_fused(outcome: Outcomes, name: str, dtype: str, setting: Setting):
    for graph in outcome(name, dtype, setting).graphs:
        sites = graph.report["sites"]
        assert [site["pattern"] for site in sites] == ["all_reduce_rms_norm"] + 2 * LAYERS * ["all_reduce_add_rms_norm"]
        assert all(site["strategy"] for site in sites)
        assert "reduced" in sites[0]["attributes"]["live"], "the embedding is the first residual as well"


@pytest.mark.parametrize(("name", "dtype", "setting"), RUNS)
def test_fusion_takes_no_answer_further_from_the_truth(outcome: Outcomes, name: str, dtype: str, setting: Setting):
    assert_answers_are_as_near_to_float64(outcome(name, dtype, setting), DTYPES[dtype])


@pytest.mark.parametrize(("name", "dtype", "setting"), RUNS)
def test_nothing_of_a_fused_chain_is_computed_twice(outcome: Outcomes, name: str, dtype: str, setting: Setting):
    for graph in outcome(name, dtype, setting).graphs:
        gone = graph.before - graph.survivors
        chains = Counter({part: SITES * count for part, count in PARTS_OF_A_NORM.items()})
        chains["aten.add.Tensor"] += 2 * LAYERS  # residuals
        if dtype == "bf16":
            chains["prims.convert_element_type.default"] = 2 * SITES
        assert {target: gone[target] for target in chains} == chains
        assert not graph.unmarked, "nodes without the name of the strategy that they came from"


@pytest.mark.parametrize(("name", "dtype", "setting"), RUNS)
def test_no_collective_runs_twice(outcome: Outcomes, name: str, dtype: str, setting: Setting):
    run = outcome(name, dtype, setting)
    steps = len(run.compiled_after_call) // 3  # one round to compile, one fused, one unfused
    assert run.unfused == {"all_reduce": SITES * steps, "all_gather": steps}  # that of the vocabulary's logits
    assert run.fused == run.unfused


@pytest.mark.parametrize(
    ("name", "dtype", "setting"),
    [run for run in RUNS if run.values[2].dynamic],  # type: ignore[union-attr]
)
def test_another_length_runs_through_the_same_fused_graph(outcome: Outcomes, name: str, dtype: str, setting: Setting):
    run = outcome(name, dtype, setting)
    # with a cache: prompt, first token and second token, which share a graph
    assert run.compiled_after_call == ([1, 2, 2, 2, 2, 2, 2, 2, 2] if setting.cached else 6 * [1])
    assert all(is_symbolic(site["attributes"]["inputs"]["x"]) for site in run.graphs[0].report["sites"])


@pytest.mark.parametrize(
    ("name", "dtype", "setting"),
    [run for run in RUNS if not run.values[2].dynamic],  # type: ignore[union-attr]
)
def test_static_shapes_stay_static(outcome: Outcomes, name: str, dtype: str, setting: Setting):
    for graph in outcome(name, dtype, setting).graphs:
        assert not any(is_symbolic(site["attributes"]["inputs"]["x"]) for site in graph.report["sites"])


def is_symbolic(tensor: str) -> bool:
    """Whether ``bfloat16[2, s50, 64]`` has a size that is no number."""
    return any(not size.strip().isdigit() for size in tensor.partition("[")[2].rstrip("]").split(","))


def test_an_operator_that_no_compiler_can_look_into_takes_the_place_of_the_chain(
    pool: WorkerPool, checkpoint: Callable[[str], Path]
):
    setting = SETTINGS["bf16"][0]
    run = pool.run(survey, checkpoint("llama"), torch.bfloat16, [setting], "opaque")[0][str(setting)]
    (graph,) = run.graphs
    after = graph.survivors + graph.added
    operators = {target: count for target, count in after.items() if target.startswith("fusion_core_model_tests.")}
    assert operators == {
        "fusion_core_model_tests.rms_norm.default": 1,
        "fusion_core_model_tests.add_rms_norm.default": 2 * LAYERS,
    }
    assert not {"_c10d_functional.all_reduce.default", "aten.rsqrt.default", "aten.mean.dim"} & after.keys()
    assert run.fused == run.unfused == {"all_reduce": SITES, "all_gather": 1}
    assert_answers_are_as_near_to_float64(run, torch.bfloat16)
