"""Every family of `docs/models.md`: what is recognised at each of its all_reduces, and that its answers stay."""

import dataclasses
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet

from examples import recognised_models
from fusion_core.workers import WorkerPool
from tests.models.architectures import FAMILIES, LAYERS
from tests.models.calls import Setting
from tests.models.conftest import assert_answers_are_as_near_to_float64
from tests.models.jobs import Outcome, survey

ROOT = Path(__file__).parent.parent.parent

# A site: the longest pattern that stands there, and its live outputs.
BARE = ("all_reduce", ("reduced",))
FIRST = ("all_reduce_rms_norm", ("normed", "reduced"))
NORM = ("all_reduce_rms_norm", ("normed",))
ADD = ("all_reduce_add_rms_norm", ("normed", "residual_out"))
LAST = ("all_reduce_add_rms_norm", ("normed",))
SANDWICH = ("all_reduce_rms_norm_add_rms_norm", ("normed", "residual_out"))
LAST_SANDWICH = ("all_reduce_rms_norm_add_rms_norm", ("normed",))
FIRST_LAYER = ("all_reduce_layer_norm", ("normed", "reduced"))
ADD_LAYER = ("all_reduce_add_layer_norm", ("normed", "residual_out"))
LAST_LAYER = ("all_reduce_add_layer_norm", ("normed",))
QUERIES_AND_KEYS = ("sharded_rms_norm_pair", ("normed", "y_normed"))
VALUES = ("all_gather_shard", ("shard",))
GATHERED = (QUERIES_AND_KEYS, VALUES)
"""The attention of a model whose norms of queries and keys are over all heads: three all_gathers."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What a family has.

    Attributes:
        sites: In graph order.
        weight_bias: Of every norm.
        refused: Indices of bare sites → the code of the reason why no norm is fused there, and words of it.
        merges: How many of the sites are two all_reduces of the model.
    """

    sites: tuple[tuple[str, tuple[str, ...]], ...]
    weight_bias: float = 0.0
    refused: Mapping[tuple[int, ...], tuple[str, str]] = dataclasses.field(default_factory=dict)
    merges: int = 0


ONCE = Setting(dynamic=False, cached=False, mode="no_grad")
PRE_NORM = Row((FIRST, ADD, ADD, ADD, LAST))
UNNORMED = {(0,): ("structure", "needs rms_norm of it")}
POST_NORM = Row((BARE, NORM, NORM, NORM, LAST_SANDWICH), refused=UNNORMED)
POST_NORM_GATHERED = Row((BARE, *GATHERED, NORM, NORM, *GATHERED, NORM, LAST_SANDWICH), refused=UNNORMED)
PRE_NORM_GATHERED = Row((FIRST, *GATHERED, ADD, ADD, *GATHERED, ADD, LAST))
SIDE_BY_SIDE = Row((FIRST_LAYER, ADD_LAYER, LAST_LAYER), merges=LAYERS)  # attention and MLP
SCALED_EMBEDDING = {(0,): ("scaled", "of what is scaled by")}  # by a constant that is a tensor of the model
LAYER_NORM = Row((FIRST_LAYER, ADD_LAYER, ADD_LAYER, ADD_LAYER, LAST_LAYER))
WHOLE_ATTENTION = Row((FIRST, ADD, LAST))  # attention is whole on every rank
SCALED_EVERYWHERE = Row(5 * (BARE,), refused={(0, 1, 2, 3, 4): ("scaled", "scaled by")})
SUMMED_AFTERWARDS = ("structure", "is followed by sum")

ROWS = {
    "llama": PRE_NORM,
    "qwen2": PRE_NORM,
    "qwen3": PRE_NORM,
    "mistral": PRE_NORM,
    "phi3": PRE_NORM,
    "mixtral": PRE_NORM,
    "qwen3_moe": PRE_NORM,
    "qwen2_moe": PRE_NORM,
    # what each expert gives is summed over the ranks by itself: the shared expert's sum is of fewer rows
    "llama4": Row((FIRST, ADD, BARE, ADD, ADD, BARE, LAST), refused={(2, 5): SUMMED_AFTERWARDS}),
    # attention is whole on every rank; routed and shared experts are summed together
    "deepseek_v3": Row((FIRST, ADD, LAST), merges=LAYERS),
    "gemma": Row((BARE, ADD, ADD, ADD, LAST), 1.0, SCALED_EMBEDDING),
    "gemma2": Row((BARE, SANDWICH, SANDWICH, SANDWICH, LAST_SANDWICH), 1.0, SCALED_EMBEDDING),
    "gemma3": Row((BARE, SANDWICH, SANDWICH, SANDWICH, LAST_SANDWICH), 1.0, SCALED_EMBEDDING),
    "glm4": Row((FIRST, SANDWICH, SANDWICH, SANDWICH, LAST_SANDWICH)),
    "olmo2": POST_NORM_GATHERED,
    "granite": Row(5 * (BARE,), refused={(0,): ("scaled", "scaled by 12"), (1, 2, 3, 4): ("scaled", "scaled by")}),
    "cohere": SIDE_BY_SIDE,
    "cohere2": SIDE_BY_SIDE,
    "phi": SIDE_BY_SIDE,
    # its plan leaves the embedding whole
    "gpt_neox": Row((ADD_LAYER, LAST_LAYER), merges=LAYERS),
    # attention is whole on every rank; what is added to the experts' sum is the shared expert's
    "afmoe": Row((FIRST, LAST, LAST)),
    "apertus": PRE_NORM,
    "arcee": PRE_NORM,
    "cohere2_moe": SIDE_BY_SIDE,
    "cwm": PRE_NORM,
    "deepseek_v2": Row((FIRST, ADD, ADD, ADD, LAST), merges=LAYERS),
    "deepseek_v32": Row((FIRST, ADD, ADD, ADD, LAST), merges=LAYERS),
    "dots1": Row((FIRST, ADD, ADD, ADD, LAST), merges=LAYERS),
    "ernie4_5": PRE_NORM,
    "exaone4": POST_NORM,
    "exaone_moe": PRE_NORM,
    "flex_olmo": POST_NORM_GATHERED,
    # what a layer gives is multiplied by a number of the layer before the next norm
    "gemma4": Row((BARE, SANDWICH, NORM, SANDWICH, NORM), refused=SCALED_EMBEDDING),
    "glm": PRE_NORM,
    "glm4_moe": Row((FIRST, ADD, ADD, ADD, LAST), merges=LAYERS),
    "glm4_moe_lite": PRE_NORM,
    "glm_moe_dsa": Row((FIRST, ADD, ADD, ADD, LAST), merges=LAYERS),
    "granitemoe": WHOLE_ATTENTION,
    "granitemoeshared": WHOLE_ATTENTION,
    "helium": PRE_NORM,
    "hunyuan_v1_moe": WHOLE_ATTENTION,
    "hyperclovax": Row((FIRST, SANDWICH, SANDWICH, SANDWICH, LAST_SANDWICH)),
    "jais2": LAYER_NORM,
    "minicpm3": SCALED_EVERYWHERE,
    # its plan leaves the embedding whole; the norm's result is the residual
    "minimax": Row((NORM, LAST, LAST, LAST)),
    "minimax_m2": PRE_NORM_GATHERED,
    "ministral": PRE_NORM,
    "ministral3": PRE_NORM,
    "nanochat": Row((NORM, ADD, ADD, ADD, LAST)),  # the embedding is normed before it is the residual
    "nemotron": dataclasses.replace(LAYER_NORM, weight_bias=1.0),
    "olmo": LAYER_NORM,
    "olmo3": POST_NORM_GATHERED,
    "olmoe": PRE_NORM_GATHERED,
    "phimoe": Row((FIRST_LAYER, ADD_LAYER, LAST_LAYER)),  # attention is whole on every rank
    "qwen3_5": Row((FIRST, ADD, LAST), 1.0),  # linear attention is whole on every rank
    "qwen3_next": Row((FIRST, BARE, ADD, BARE, LAST), 1.0, {(1, 3): ("factor", "is broadcast by mul")}),
    "seed_oss": PRE_NORM,
    "smollm3": PRE_NORM,
    "solar_open": PRE_NORM,
    "starcoder2": LAYER_NORM,
    "vaultgemma": Row((BARE, ADD, ADD, ADD, LAST), 1.0, SCALED_EMBEDDING),
    "youtu": WHOLE_ATTENTION,
}

# The rows of which only a model has the kind: experts, all_reduces that merge, gathered heads. Others are the nightly run's, since
# `test_decode.py` has Llama's, and the corpus scaled sums, biases and weights that 1 is added to.
SOON = ("deepseek_v3", "olmo2")

Outcomes = Callable[[str], Outcome]


def _run(name: str) -> ParameterSet:
    return pytest.param(name, marks=() if name in SOON else pytest.mark.nightly)


@pytest.fixture(scope="module")
def outcome(pool: WorkerPool, checkpoint: Callable[[str], Path]) -> Outcomes:
    """What came of a family on rank 0; runs on first use."""
    found: dict[str, Outcome] = {}

    def get(name: str) -> Outcome:
        if name not in found:
            found[name] = pool.run(survey, checkpoint(name), torch.bfloat16, [ONCE])[0][str(ONCE)]
        return found[name]

    return get


def test_every_family_has_a_row():
    assert FAMILIES.keys() == ROWS.keys()


@pytest.mark.parametrize("name", [_run(name) for name in ROWS])
def test_the_longest_pattern_at_each_all_reduce(outcome: Outcomes, name: str):
    (graph,) = outcome(name).graphs
    sites = graph.report["sites"]
    assert tuple((site["pattern"], tuple(site["attributes"]["live"])) for site in sites) == ROWS[name].sites
    normed = [site for site in sites if site["pattern"] not in ("all_reduce", "all_gather_shard")]
    assert {site["attributes"]["weight_bias"] for site in normed} <= {ROWS[name].weight_bias}
    assert all(site["strategy"] for site in sites)


@pytest.mark.parametrize("name", [_run(name) for name, row in ROWS.items() if BARE in row.sites])
def test_why_no_longer_pattern_stands_there(outcome: Outcomes, name: str):
    (graph,) = outcome(name).graphs
    sites, refused = graph.report["sites"], ROWS[name].refused
    assert sorted(index for indices in refused for index in indices) == [
        index for index, site in enumerate(ROWS[name].sites) if site == BARE
    ]
    for indices, (code, words) in refused.items():
        for index in indices:
            reasons = [miss["reason"] for miss in sites[index]["near_misses"]]
            said = [f"{reason['found']}, needs {reason['needs']}" for reason in reasons if reason["code"] == code]
            assert any(words in each for each in said), (index, reasons)


@pytest.mark.parametrize("name", [_run(name) for name in ROWS])
def test_fusion_takes_no_answer_further_from_the_truth(outcome: Outcomes, name: str):
    # one draw of weights and tokens a family: the ratio of two largest errors is itself a matter of chance
    assert_answers_are_as_near_to_float64(outcome(name), torch.bfloat16, factor=1.5)


@pytest.mark.parametrize("name", [_run(name) for name in ROWS])
def test_no_collective_runs_twice(outcome: Outcomes, name: str):
    run, row = outcome(name), ROWS[name]
    gathers = sum(row.sites.count(each) for each in (QUERIES_AND_KEYS, QUERIES_AND_KEYS, VALUES))
    gone = Counter({"all_reduce": row.merges, "all_gather": gathers})
    assert run.fused == run.unfused - gone + Counter({"all_reduce": row.sites.count(QUERIES_AND_KEYS)})
    assert run.fused["all_reduce"] == len(row.sites) - row.sites.count(VALUES)


@pytest.mark.parametrize("name", [_run(name) for name in ROWS])
def test_sums_that_are_added_become_one(outcome: Outcomes, name: str):
    (graph,) = outcome(name).graphs
    assert [len(merge["nodes"]) for merge in graph.report["merges"]] == ROWS[name].merges * [2]
    assert not [merge for merge in graph.report["merges"] if merge["reasons"]]
    assert not graph.unmarked


# ---- the page


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [SOON, pytest.param(tuple(FAMILIES), marks=pytest.mark.nightly)], ids=["soon", "all"])
def test_the_page_has_the_table_of_what_was_found(outcome: Outcomes, page: str, names: tuple[str, ...]):
    table = recognised_models.table({name: outcome(name).graphs[0].report for name in names})
    *rows, _, versions = table.splitlines()
    assert not {*rows} - {*page.splitlines()}, "stale: run python tests/docs/test_docs.py models"
    # Another torch finds the same rows, and the page says with which one they were found.
    assert names != tuple(FAMILIES) or versions in page


@pytest.mark.nightly  # `recognised_models.table` is what it prints
def test_the_command_prints_what_the_page_has(page: str):
    names = ["gemma"]
    command = [sys.executable, str(ROOT / "examples" / "recognised_models.py"), *names]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    head, rule, *rows, _, versions = ran.stdout.splitlines()
    assert len(rows) == len(names)
    assert {head, rule, *rows, versions} <= {*page.splitlines()}


def test_the_command_names_the_families_that_it_does_not_have(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        recognised_models.main(["llama", "lama"])
    said = capsys.readouterr().err
    assert "lama is not among the families, needs any of llama, qwen2" in said


def test_a_family_says_why_where_it_has_bare_sums_and_only_there():
    assert {name for name, family in FAMILIES.items() if family.why} == {n for n, r in ROWS.items() if BARE in r.sites}


def test_layers_are_alike():
    """The table says how many sites a layer has: as many in each."""
    for row in ROWS.values():
        assert len([site for site in row.sites if site[0].startswith("all_reduce")]) % LAYERS in (0, 1)
