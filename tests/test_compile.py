"""``torch.compile`` with our backend: through all of Inductor, its cache key, its options, other passes."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import fusion_core
from fusion_core import DType, FusionConfig, FusionPass, Strategy
from fusion_core._torch import inductor
from fusion_core.report import cache as report_cache
from tests.acme import KERNEL, acme, opaque
from tests.support.graphs import REFERENCE, registry
from tests.test_matching import ADD, norm, reduce, tensors

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No graph from an earlier test, in memory or on disk."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()


def unfused(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
    total = r + reduce(x)
    return norm(total, w), total


def test_the_backend_is_found_by_name_and_records_a_report() -> None:
    before = len(fusion_core.reports())
    given = tensors()
    with torch.no_grad():
        results = torch.compile(unfused, backend="fusion_core")(*given)
        torch.testing.assert_close(results, unfused(*given), rtol=0.02, atol=0.02)
    report = fusion_core.last_report()
    assert report is fusion_core.reports()[before]
    assert report.fused[0].strategy == f"reference.{ADD}"


def test_compile_takes_a_config_and_refuses_another_backend() -> None:
    with torch.no_grad():
        fusion_core.compile(unfused, FusionConfig(order=()), dynamic=False)(*tensors())
    report = fusion_core.last_report()
    assert report is not None
    assert report.sites
    assert not report.fused
    with pytest.raises(TypeError, match="got backend=, needs none"):
        fusion_core.compile(unfused, backend="inductor")
    with pytest.raises(fusion_core.BackendError, match="'flashinfr'"):
        fusion_core.compile(unfused, FusionConfig(order=("flashinfr",)))


@pytest.mark.parametrize("given", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"max_autotune": True}}])
def test_mode_and_options_reach_inductor(given: dict[str, Any]) -> None:
    seen = []

    class Spy(inductor.CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            seen.append(torch._inductor.config.max_autotune)

        def uuid(self) -> None:
            return None

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    with torch._inductor.config.patch(post_grad_custom_post_pass=Spy()), torch.no_grad():
        torch.compile(unfused, backend="fusion_core", **given)(*tensors())
    assert seen == [True]
    assert fusion_core.last_report().fused


@pytest.mark.parametrize("given", [{"mode": "fastest"}, {"options": {"no_such_option": 1}}])
def test_an_unknown_mode_or_option_is_torchs_own_error(given: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"fastest|no_such_option"), torch.no_grad():
        torch.compile(unfused, backend="fusion_core", **given)(*tensors())


@pytest.mark.parametrize("how", ["in Inductor's configuration", "in options", "a plain function"])
def test_a_pass_that_the_user_had_set_runs_first_and_ours_behind_it(how: str) -> None:
    seen = []

    def spy(graph: fx.Graph) -> None:
        seen.append([n for n in graph.nodes if n.meta.get("fusion_core")])

    class Spy(inductor.CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            spy(graph)

        def uuid(self) -> str:
            return "spy"

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    own = spy if how == "a plain function" else Spy()
    options = {"post_grad_custom_post_pass": own} if how == "in options" else {}
    patch = {} if how == "in options" else {"post_grad_custom_post_pass": own}
    with torch._inductor.config.patch({**patch}), torch.no_grad():
        torch.compile(unfused, backend="fusion_core", options=options)(*tensors())
    assert seen == [[]]  # it saw the graph once, before ours
    assert fusion_core.last_report().fused


def test_the_pass_set_by_hand_works_without_the_backend() -> None:
    with torch._inductor.config.patch(post_grad_custom_post_pass=FusionPass()), torch.no_grad():
        before = len(fusion_core.reports())
        torch.compile(unfused)(*tensors())
    assert [len(report.fused) for report in fusion_core.reports()[before:]] == [1]


def test_a_cached_graph_whose_report_nobody_kept_says_so() -> None:
    """A pass set by hand shares its key with the backend, and leaves no report on disk."""
    with torch.no_grad():
        with torch._inductor.config.patch(post_grad_custom_post_pass=FusionPass()):
            torch.compile(unfused)(*tensors())
        torch._dynamo.reset()
        torch.compile(unfused, backend="fusion_core")(*tensors())
    report = fusion_core.last_report()
    assert report.origin == "cache"
    assert "from the compile cache, and its report was not kept" in str(report)


def test_a_report_is_kept_before_another_rank_can_find_the_graph(monkeypatch: Any) -> None:
    from torch._inductor.codecache import FxGraphCache

    events: list[str] = []

    def watch(place: Any, name: str, event: str) -> None:
        real = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *args, **kwargs: (events.append(event), real(*args, **kwargs))[1])

    watch(report_cache, "save", "report")
    watch(FxGraphCache, "_save_graph", "graph")
    with torch.no_grad():
        torch.compile(unfused, backend="fusion_core")(*tensors())
    assert events.index("report") < events.index("graph")


def test_a_graph_from_the_cache_shows_what_was_recorded_when_it_was_compiled() -> None:
    with torch.no_grad():
        for origin in ("compiled", "cache"):
            torch._dynamo.reset()
            torch.compile(unfused, backend="fusion_core")(*tensors())
            report = fusion_core.last_report()
            assert report.origin == origin
            assert report.fused[0].strategy == f"reference.{ADD}"
    assert f"from the compile cache, as recorded when it was compiled at {report.compiled_at}" in str(report)


def test_sequences_of_passes_have_a_key_only_where_each_has_one() -> None:
    own = FusionPass()
    assert inductor.with_pass(own, {})["post_grad_custom_post_pass"] is own
    keyed = inductor.with_pass(own, {"post_grad_custom_post_pass": FusionPass(dry_run=True)})
    assert keyed["post_grad_custom_post_pass"] is own  # another pass of ours gives way
    plain = inductor.with_pass(own, {"post_grad_custom_post_pass": lambda graph: None})
    assert not plain["post_grad_custom_post_pass"].uuid()


def test_a_key_that_no_cache_may_be_asked_for_is_false_and_never_the_same_text() -> None:
    """Inductor asks whether it is false; vLLM's pass manager hashes JSON of whatever it gets, None too."""
    one, other = inductor.NotCached(), inductor.NotCached()
    assert not one
    assert json.dumps({"passes": [one]}) != json.dumps({"passes": [other]})
    assert pickle.loads(pickle.dumps(one)) == one


def test_the_pass_survives_inductors_copying_and_a_pickle() -> None:
    own = FusionPass(FusionConfig(limit=2))
    assert copy.deepcopy(own) is own
    assert copy.deepcopy({"pass": own})["pass"] is own
    again = pickle.loads(pickle.dumps(own))
    assert again.config == own.config
    assert again.uuid() == own.uuid()


def keys(monkeypatch: Any) -> dict[str, str]:
    """The key of passes that differ in one thing each."""
    narrow = Strategy(
        ADD, "acme.add", opaque, requires=(DType("x", torch.float16),), outputs=("normed", "residual_out")
    )
    quick = Strategy(
        ADD, "acme.add", opaque, worthwhile=(DType("x", torch.float16),), outputs=("normed", "residual_out")
    )
    renamed = Strategy(ADD, "acme.other", opaque, outputs=("normed", "residual_out"))
    optional = Strategy(ADD, "acme.add", opaque, outputs=("normed", "residual_out"), option="fast")
    ranked = Strategy(ADD, "acme.add", opaque, outputs=("normed", "residual_out"), rank=1)

    def key(*points: Any, **config: Any) -> str:
        return FusionPass(registry=registry(*points, config=FusionConfig(**config))).uuid()

    return {
        "reference": key(REFERENCE),
        "nothing": key(),
        "kernel": key(acme(monkeypatch, KERNEL), REFERENCE),
        "kernel with a requirement": key(acme(monkeypatch, narrow), REFERENCE),
        "kernel with a measured range": key(acme(monkeypatch, quick), REFERENCE),
        "kernel of another name": key(acme(monkeypatch, renamed), REFERENCE),
        "kernel of another rank": key(acme(monkeypatch, ranked), REFERENCE),
        "kernel behind an option": key(acme(monkeypatch, optional), REFERENCE),
        "its option": key(acme(monkeypatch, optional), REFERENCE, options=("acme.fast",)),
        "order": key(acme(monkeypatch, KERNEL), REFERENCE, order=("reference", "acme")),
        "limit": key(REFERENCE, limit=1),
        "max_tokens": key(REFERENCE, max_tokens=2048),
        "numerics": key(REFERENCE, numerics="deterministic"),
        "dry run": FusionPass(registry=registry(REFERENCE), dry_run=True).uuid(),
    }


def test_whatever_changes_a_decision_changes_the_cache_key(monkeypatch: Any) -> None:
    found = keys(monkeypatch)
    assert len(set(found.values())) == len(found), found
    assert keys(monkeypatch) == found


def test_the_cache_key_is_the_same_in_another_process() -> None:
    command = [sys.executable, "-c", "import fusion_core; print(fusion_core.FusionPass().uuid())"]
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert again.stdout.strip() == FusionPass().uuid()


def test_a_backend_taken_away_does_not_run_from_inductors_cache(monkeypatch: Any) -> None:
    """The trap of a constant key: the cached graph would go on calling the kernel."""
    with_kernel = FusionPass(registry=registry(acme(monkeypatch, KERNEL), REFERENCE))
    without = FusionPass(registry=registry(REFERENCE))
    for own, expected in ((with_kernel, "acme.add"), (without, f"reference.{ADD}")):
        torch._dynamo.reset()
        with torch._inductor.config.patch(post_grad_custom_post_pass=own), torch.no_grad():
            torch.compile(unfused)(*tensors())
        report = fusion_core.last_report()
        assert report.fused[0].strategy == expected
        assert report.origin == "compiled"


def test_a_graph_break_gives_a_report_a_graph() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        first = norm(r + reduce(x), w)
        torch._dynamo.graph_break()
        return norm(first + reduce(first), w)

    before = len(fusion_core.reports())
    with torch.no_grad():
        torch.compile(model, backend="fusion_core")(*tensors())
    assert [len(report.fused) for report in fusion_core.reports()[before:]] == [1, 1]


def test_a_hand_placed_fusion_is_found_in_a_compiled_model() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return fusion_core.ops.all_reduce_add_rms_norm(x * 1, r, w, 1e-5, weight_bias=1.0)

    given = tensors()
    with torch.no_grad():
        compiled = torch.compile(model, backend="fusion_core", fullgraph=True)(*given)
        torch.testing.assert_close(compiled, model(*given), rtol=0.02, atol=0.02)
    site = fusion_core.last_report().sites[0]
    assert (site.strategy, site.attributes["weight_bias"]) == (f"reference.{ADD}", 1.0)
