"""The order of things, with compilers that compile nothing; `tests/cli/test_bench.py` has the real ones."""

import contextlib
import gc
import time
import weakref

import pytest
import torch

import fusion_core
from fusion_core import FusionConfig
from fusion_core.bench import run as module
from fusion_core.bench.run import Plan, run
from fusion_core.report import history
from fusion_core.report.report import Report, SiteReport
from fusion_core.user_code import Call

pytestmark = pytest.mark.usefixtures("one_rank")
CONFIG = FusionConfig(order=())


@pytest.fixture
def compilers(monkeypatch):
    """Both sides run eagerly; a size that the fused side has not seen makes a report. Gives what each was asked for."""
    asked = []

    def plain(function, **options):
        asked.append(("plain", function, options))
        return function

    def fused(function, config, **options):
        asked.append(("fused", function, options))
        seen = set()

        def call(args, kwargs):
            key = (args[0].shape[0] == 1) if options["dynamic"] else args[0].shape
            if key not in seen:
                seen.add(key)
                size = int(args[0].shape[0])
                history.record(Report(sites=(SiteReport("all_reduce", f"acme.{size}", "n", {}, ()),)))
            return function(args, kwargs)

        assert config is CONFIG
        return call

    monkeypatch.setattr(torch, "compile", plain)
    monkeypatch.setattr(fusion_core, "compile", fused)
    return asked


class Doubling(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def plan(**changes):
    settings = {"mode": None, "dynamic": False, "rounds": 2, "seconds": 0.001, "most_difference": None, "budget": None}
    return Plan(CONFIG, **{**settings, "began": time.monotonic(), **changes})


def measured(build, *batches, **changes):
    stages = []

    @contextlib.contextmanager
    def stage(words):
        stages.append(words)
        yield

    return run(plan(**changes), batches, build, stage), stages


def test_every_batch_size_has_a_row_and_stages(compilers):
    outcome, stages = measured(lambda batch: Call(Doubling(), (torch.ones(batch, 2),)), 4, 8)
    assert [row.batch for row in outcome.rows] == [4, 8]
    assert [row.fusion.strategies for row in outcome.rows] == [{"acme.4": 1}, {"acme.8": 1}]
    assert all(row.new_graph and row.difference == row.repeated == 0.0 for row in outcome.rows)
    assert all(len(row.plain_us) == len(row.fused_us) == 2 for row in outcome.rows)
    assert outcome.rows[0].difference_limit == 1e-3
    assert (outcome.mode, outcome.device) == ("default", "cpu")
    assert stages[4:] == [
        "batch 8: building",
        "batch 8: compiling without fusion_core",
        "batch 8: compiling with fusion_core",
        "batch 8: measuring",
    ]


def test_both_sides_are_asked_for_the_same_and_have_code_of_their_own(compilers):
    measured(lambda batch: Call(Doubling(), (torch.ones(2),)), None, mode="max-autotune")
    (plain, fused) = compilers
    assert [plain[0], fused[0]] == ["plain", "fused"]
    assert plain[2] == fused[2] == {"mode": "max-autotune", "dynamic": False}
    assert plain[1].__code__ is not fused[1].__code__


def test_the_old_model_is_gone_before_there_is_a_new_one(compilers):
    alive = []

    def build(batch):
        compilers.clear()  # which know the functions
        gc.collect()
        assert [model for model in alive if model() is not None] == []
        model = Doubling()
        alive.append(weakref.ref(model))
        return Call(model, (torch.ones(batch),))

    measured(build, 2, 3)
    assert len(alive) == 2
    compilers.clear()
    gc.collect()
    assert alive[1]() is None


def test_one_dynamic_graph_serves_all_sizes_of_one_model_but_1(compilers):
    model = Doubling()
    outcome, _ = measured(lambda batch: Call(model, (torch.ones(batch, 2),)), 8, 1, 32, dynamic=True)
    assert [row.new_graph for row in outcome.rows] == [True, True, False]
    assert [row.fusion.strategies for row in outcome.rows] == [{"acme.8": 1}, {"acme.1": 1}, {"acme.8": 1}]
    assert [kind for kind, *_ in compilers] == ["plain", "fused"]


def test_floats_stay_numbers_in_a_dynamic_graph_and_nowhere_else(compilers):
    import torch._dynamo.config as settings

    found = []
    before = settings.specialize_float

    def build(batch):
        found.append(settings.specialize_float)
        return Call(Doubling(), (torch.ones(batch),))

    measured(build, 2, dynamic=True)
    measured(build, 2)
    assert found == [True, before]
    assert settings.specialize_float == before


def test_a_budget_leaves_out_what_it_has_no_time_for(compilers, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def build(batch):
        now[0] += batch
        return Call(Doubling(), (torch.ones(2),))

    outcome, _ = measured(build, 10, 20, 5, 40, budget=50, began=1000.0)
    # 10 and 20 take until 30; with 20 more, the longest so far, it is 50
    assert [row.batch for row in outcome.rows] == [10, 20]
    assert outcome.left_out == (5, 40)


def test_a_budget_that_is_used_up_leaves_no_row(compilers):
    outcome, _ = measured(lambda batch: Call(Doubling(), (torch.ones(2),)), 1, budget=0.0)
    assert outcome.rows == ()
    assert outcome.left_out == (1,)


def test_another_answer_is_seen(compilers, monkeypatch):
    monkeypatch.setattr(fusion_core, "compile", lambda function, config, **options: lambda a, k: function(a, k) * 1.5)
    outcome, _ = measured(lambda batch: Call(Doubling(), (torch.ones(2),)), None)
    assert outcome.rows[0].difference == 0.5
    assert "with and without fusion_core differ by 0.5" in outcome.problems(None)[0]


def test_a_model_that_moves_on_is_told_from_a_wrong_one(compilers):
    class Counting(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    outcome, _ = measured(lambda batch: Call(Counting(), (torch.ones(2),)), None)
    assert "two calls without fusion_core differ" in outcome.problems(None)[0]
    assert "has to rewind it" in outcome.problems(None)[0]


def test_the_limit_can_be_given(compilers):
    outcome, _ = measured(lambda batch: Call(Doubling(), (torch.ones(2),)), None, most_difference=0.7)
    assert outcome.rows[0].difference_limit == 0.7


def test_what_is_compiled_already_is_compiled_from_its_source(compilers):
    eager = Doubling()
    wrapped = torch._dynamo.eval_frame.OptimizedModule(eager, torch._dynamo.optimize("eager"))
    outcome, _ = measured(lambda batch: Call(wrapped, (torch.ones(2),)), None)
    assert outcome.rows[0].difference == 0.0
    found = compilers[0][1].__closure__[0].cell_contents
    assert found is eager


def test_an_error_leaves_no_graph_behind(compilers, monkeypatch):
    forgotten = []
    monkeypatch.setattr(module, "forget", lambda: forgotten.append(True))

    def model(x):
        raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        measured(lambda batch: Call(model, (torch.ones(2),)), None)
    assert forgotten == [True]
