"""A real vLLM on a CPU, on the compile path that CUDA takes: what fusion_core does there. `make test-vllm` runs it.

vLLM on a CPU has its own collectives and no fused kernels. The distribution in `lab/` sends it along CUDA's path
(VLLM_COMPILE, piecewise graphs, ``vllm::all_reduce``) and has kernels that are opaque to Inductor.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm_lab") is None, reason="needs vLLM and the lab: `make test-vllm` installs both"
)

PROGRAM = Path(__file__).parent / "engine.py"
SITES = 7  # of a Llama of three layers: the embedding's all_reduce, and two of each layer
ON: dict[str, Any] = {"fusion_core": {}}
PASS_ALONE = {"inductor_passes": {"post_grad_custom_post_pass": "fusion_vllm.fusion_pass"}}

ADD = ("all_reduce_add_rms_norm", "lab.all_reduce_add_rms_norm")

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from tests.vllm_engine import models

    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = models.save(name, folder)
        return made[name]

    return get


@pytest.fixture(scope="session")
def run(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One engine in processes of its own."""

    def start(
        model: str = "llama", *, cache: Path | None = None, environment: dict[str, str] | None = None, **job: Any
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("run")
        job |= {"model": str(checkpoint(model)), "out": str(folder / "out.json")}
        job["compilation"] = {"compile_sizes": []} | job.get("compilation", {})
        root = cache or folder / "cache"
        variables = {"VLLM_LAB": "1", "VLLM_CACHE_ROOT": str(root)} | (environment or {})
        command = [sys.executable, str(PROGRAM), json.dumps(job)]
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, timeout=400, check=False
        )
        if not Path(job["out"]).exists():
            raise AssertionError(f"vLLM ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
        return json.loads(Path(job["out"]).read_text(encoding="utf-8")) | {"log": done.stdout + done.stderr}

    return start


@pytest.fixture(scope="session")
def plain(run: Run) -> Callable[..., dict[str, Any]]:
    """The same engine without fusion_core."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def get(model: str, **job: Any) -> dict[str, Any]:
        key = (model, *sorted(job.items()))
        if key not in found:
            found[key] = run(model, **job)
        return found[key]

    return get


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def cold(run: Run, cache: Path) -> dict[str, Any]:
    """The first start with fusion."""
    return run(additional=ON, cache=cache)


def per_step(found: dict[str, Any]) -> list[dict[str, int]]:
    """How often each kernel and vLLM's own all_reduce ran in a step, by rank.

    How many steps there are depends on when the engine gets the requests.
    """
    ranks = []
    for calls in found["calls"]:
        steps = sum(calls.values()) // SITES
        assert steps > 12
        assert all(n % steps == 0 for n in calls.values()), calls
        ranks.append({name: n // steps for name, n in calls.items() if n})
    assert sum(ranks[0].values()) == SITES
    return ranks


def kernels(found: dict[str, Any]) -> list[dict[str, int]]:
    """How often each kernel ran in a step, by rank."""
    return [{name: n for name, n in calls.items() if name.startswith("lab.")} for calls in per_step(found)]


UNFUSED = {"all_reduce": SITES}
"""A step without kernels."""


def sites(found: dict[str, Any]) -> list[list[tuple[str, str | None]]]:
    """The pattern and the strategy at each site of a rank's graphs."""
    return [
        [(site["pattern"], site["strategy"]) for report in reports for site in report["sites"]]
        for reports in found["reports"]
    ]


def counted(found: dict[str, Any]) -> list[int]:
    """A rank's sites, those of equal graphs as often as they run."""
    return [
        sum(len(report["sites"]) * count for report, count in zip(reports, graphs, strict=True))
        for reports, graphs in zip(found["reports"], found["graphs"], strict=True)
    ]


def assert_same_answers(found: dict[str, Any], plain: dict[str, Any]) -> None:
    assert found["tokens"] == plain["tokens"]
    for ours, theirs in zip(found["logprobs"], plain["logprobs"], strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


@pytest.mark.parametrize("model", ["llama", "gemma", "mixtral"])
def test_one_setting_fuses_every_site(run: Run, plain: Any, cold: dict[str, Any], model: str) -> None:
    found = cold if model == "llama" else run(model, additional=ON)
    assert_same_answers(found, plain(model))
    assert per_step(plain(model)) == [UNFUSED, UNFUSED]
    assert [sum(each.values()) for each in kernels(found)] == [SITES, SITES]
    for of_rank in sites(found):
        assert of_rank
        assert all(strategy == f"lab.{pattern}" for pattern, strategy in of_rank)
    assert "all_reduces on a kernel, on 2 x cpu, for 1 to 256 tokens" in found["log"]
    if model == "llama":  # the graphs between two attentions are equal, and compiled once
        assert counted(found) == [SITES, SITES]
        assert "2 equal graphs, each: fusion_core: 2 of 2 all_reduces on a kernel" in found["texts"][0]


def test_a_warm_start_runs_the_same_and_shows_the_report(
    run: Run, cold: dict[str, Any], cache: Path, plain: Any
) -> None:
    warm = run(additional=ON, cache=cache)
    assert_same_answers(warm, plain("llama"))
    assert kernels(warm) == kernels(cold)
    assert "all_reduces on a kernel, on 2 x cpu, for" not in warm["log"]  # nothing was compiled
    assert sites(warm) == sites(cold)
    assert counted(warm) == [SITES, SITES]
    assert all("from the compile cache" in text for text in warm["texts"])


def test_one_ranks_artifacts_are_lost(run: Run, cold: dict[str, Any], cache: Path, plain: Any) -> None:
    lost = [path for path in cache.rglob("rank_1_0") if "fusion_core" not in path.parts]
    assert lost
    for path in lost:
        shutil.rmtree(path)
    found = run(additional=ON, cache=cache)
    assert_same_answers(found, plain("llama"))
    assert kernels(found) == kernels(cold)


def test_another_configuration_takes_no_graph_of_the_first(
    run: Run, cold: dict[str, Any], cache: Path, plain: Any
) -> None:
    none = run(additional={"fusion_core": {"order": []}}, cache=cache)
    by_variable = run(additional=ON, cache=cache, environment={"FUSION_CORE_ORDER": "none"})
    for found in (none, by_variable):
        assert per_step(found) == [UNFUSED, UNFUSED]
        assert_same_answers(found, plain("llama"))


def test_ranks_that_differ_run_unfused_and_right(run: Run, plain: Any) -> None:
    """One rank alone has no kernels: the ranks agree on what they share, before any cache."""
    found = run(additional=ON, environment={"VLLM_LAB_WITHOUT": "VllmWorker-1"})
    assert_same_answers(found, plain("llama"))
    assert kernels(found) == [{}, {}]


def test_on_four_ranks(run: Run, plain: Any) -> None:
    found = run(additional=ON, ranks=4)
    assert_same_answers(found, plain("llama", ranks=4))
    assert [sum(each.values()) for each in kernels(found)] == 4 * [SITES]


def test_bfloat16_is_no_further_from_float32_than_without_fusion(run: Run, plain: Any) -> None:
    exact, own = plain("llama")["prompts"], plain("llama", dtype="bfloat16")["prompts"]
    found = run(additional=ON, dtype="bfloat16")
    assert [sum(each.values()) for each in kernels(found)] == [SITES, SITES]

    def error(prompts: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(prompts, exact, strict=True)) ** 0.5

    assert len(exact) > 40
    # each rounds in another order, so that either may be nearer by chance
    assert 0 < error(found["prompts"]) <= 1.2 * error(own)


def test_stock_vllm_on_a_cpu_fuses_its_all_reduce_over_shared_memory(run: Run) -> None:
    """Its own mode compiles the whole model at once, and reduces in place."""
    stock = {"VLLM_LAB": ""}
    plain, found = run(environment=stock), run(additional=ON, environment=stock)
    assert_same_answers(found, plain)
    assert [sum(each.values()) for each in kernels(found)] == [SITES, SITES]
    assert sites(found) == 2 * [[("all_reduce_rms_norm", "lab.all_reduce_rms_norm")] + (SITES - 1) * [ADD]]


def test_the_pass_alone_needs_no_plugin(run: Run, plain: Any) -> None:
    found = run(compilation=PASS_ALONE, environment={"VLLM_PLUGINS": "cpu_by_cudas_path"})
    assert_same_answers(found, plain("llama"))
    assert [sum(each.values()) for each in kernels(found)] == [SITES, SITES]


def test_a_wrong_field_is_refused_before_the_engine_starts(run: Run) -> None:
    with pytest.raises(AssertionError, match="needs names among order, strict, numerics") as error:
        run(additional={"fusion_core": {"backend": "lab"}})
    assert "Worker" not in str(error.value)


def test_off_by_default(plain: Any) -> None:
    found = plain("llama")
    assert kernels(found) == [{}, {}]
    assert "fusion_core:" not in found["log"]
