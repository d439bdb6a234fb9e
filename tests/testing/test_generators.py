"""What sites and tensors the generators give: an example that no generator can reach tests nothing."""

from dataclasses import dataclass, replace

import hypothesis
import pytest
import torch

from fusion_core import Device, MultipleOf, Reason, Site, SizeBetween, Strategy, TensorMeta, pattern
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.samples.layouts import LAYOUTS, strides
from fusion_core.samples.sites import describe
from fusion_core.samples.tensors import ROWS
from fusion_core.testing import (
    Impossible,
    NoSides,
    Sides,
    Values,
    build_tensors,
    draw_site,
    draw_tensors,
    example_site,
    repaired,
    sides,
    subjects,
)
from fusion_core.vocabulary import all_reduce, rms_norm
from tests.testing.elsewhere import ELSEWHERE
from tests.testing.one_strategy import PATTERN

PATTERNS = {each.name: each for each in CORE_PATTERNS}
SEARCH = hypothesis.settings(
    max_examples=1000,
    database=None,
    derandomize=True,
    deadline=None,
    phases=[hypothesis.Phase.generate],  # whether there is one; which is the simplest takes most of the time
)


@pytest.mark.parametrize("name", PATTERNS)
def test_the_example_of_a_pattern_is_an_ordinary_site(name):
    site = example_site(PATTERNS[name])
    assert site.inputs["x"] == TensorMeta((4, 256), torch.bfloat16, (256, 1))
    assert tuple(site.outputs) == PATTERNS[name].returns
    assert set(site.inputs) == set(PATTERNS[name].tensors)
    assert set(site.attributes) == set(PATTERNS[name].scalars)


def test_an_example_changes_as_little_as_the_requirements_ask_for():
    strategy = Strategy(PATTERN.name, "a.b", PATTERN.function, requires=ELSEWHERE)
    site = example_site(PATTERN, strategy)
    assert describe(site) == (
        "all_reduce_add_rms_norm(x=bfloat16[4, 512], residual=bfloat16[4, 512], weight=bfloat16[512], eps=1e-06, "
        "weight_bias=0.0, residual_dtype=None, norm_dtype=None) -> normed, residual_out on 4 ranks of cuda (acme1)"
    )
    assert strategy.cannot(site, PATTERN) == ()


def test_requirements_that_contradict_each_other_have_no_example():
    with pytest.raises(Impossible, match=r"x.shape\[-1\] is 256, needs 1 to 7; no variant of it meets more"):
        repaired(PATTERN, example_site(PATTERN), (MultipleOf("x", -1, 8), SizeBetween("x", -1, 1, 7)))


REACHED = {
    "one dimension": lambda site: len(site.inputs["x"].shape) == 1,
    "four dimensions": lambda site: len(site.inputs["x"].shape) == 4,
    "no rows": lambda site: 0 in site.inputs["x"].shape,
    "an odd size": lambda site: site.inputs["x"].shape[-1] == 3,
    "no weight": lambda site: "weight" not in site.inputs,
    "a float32 weight": lambda site: (
        "weight" in site.inputs and site.inputs["weight"].dtype != site.inputs["x"].dtype == torch.bfloat16
    ),
    "a float32 residual": lambda site: site.inputs["residual"].dtype != site.inputs["x"].dtype == torch.float16,
    "a large epsilon": lambda site: site.attributes["eps"] > 1e-2,
    "a small epsilon": lambda site: site.attributes["eps"] < 1e-10,
    "Gemma's weight": lambda site: site.attributes["weight_bias"] == 1.0,
    "one live output": lambda site: tuple(site.outputs) == ("reduced",),
    "all live outputs": lambda site: len(site.outputs) == 3,
    "three ranks": lambda site: site.world_size == 3,
    **{
        layout: lambda site, layout=layout: (
            site.inputs["x"].stride == strides(site.inputs["x"].shape, layout) != strides(site.inputs["x"].shape)
        )
        for layout in LAYOUTS[1:]
    },
    **{
        str(dtype): lambda site, dtype=dtype: site.inputs["x"].dtype == dtype
        for dtype in (torch.float16, torch.float32)
    },
}


@pytest.mark.parametrize("what", REACHED)
def test_drawn_sites_reach(what):
    hypothesis.find(draw_site(PATTERN, world_sizes=(2, 1, 3)), REACHED[what], settings=SEARCH)


STRATEGY = Strategy(
    PATTERN.name, "a.b", PATTERN.function, requires=ELSEWHERE[3:], outputs=("normed", "residual_out")
)  # all but the device


@pytest.mark.parametrize("requirement", [*STRATEGY.implied(PATTERN), *STRATEGY.requires], ids=str)
def test_drawn_sites_miss_each_requirement_and_no_other(requirement):
    def misses(site):
        return [each for each in (*STRATEGY.implied(PATTERN), *STRATEGY.requires) if each.unmet(site)] == [requirement]

    hypothesis.find(draw_site(PATTERN, STRATEGY), misses, settings=SEARCH)


@hypothesis.given(draw_site(PATTERN, STRATEGY, accepted=True))
def test_accepted_sites_are_accepted(site):
    assert STRATEGY.cannot(site, PATTERN) == ()


@pytest.mark.parametrize("kind", ROWS)
def test_drawn_tensors_reach_every_kind_of_row(kind):
    hypothesis.find(draw_tensors(example_site(PATTERN)), lambda values: kind in values.rows, settings=SEARCH)


def test_the_same_values_give_the_same_tensors_and_x_alone_differs_between_ranks():
    site = example_site(PATTERN)
    first, again, other = (build_tensors(site, Values(seed=3), rank) for rank in (0, 0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == (name != "x")
        assert TensorMeta.of(tensor) == site.inputs[name]


def test_rows_hold_what_their_kind_says():
    site = example_site(PATTERN)
    rows = dict(zip(ROWS, _rows(site, ROWS), strict=True))
    assert rows["zeros"].abs().max() == 0
    assert rows["huge"].abs().max() > 1e14
    assert rows["subnormal"].count_nonzero() > 200
    assert rows["subnormal"].abs().max() < torch.finfo(torch.bfloat16).smallest_normal
    assert rows["spike"][-1].abs() > 10
    assert rows["inf"][0] == torch.inf
    assert rows["-inf"][0] == -torch.inf
    assert rows["nan"].isnan().tolist() == [True] + [False] * 255
    for kind in ("zeros", "huge", "tiny", "small", "subnormal", "spike", "normal"):
        assert rows[kind].isfinite().all()
    half = replace(site, inputs={"x": TensorMeta((1, 64), torch.float16, (64, 1))})
    for kind in ("huge", "tiny", "spike"):
        row = build_tensors(half, Values(rows=(kind,)), 0)["x"]
        assert row.isfinite().all()
        assert row.count_nonzero() > 16


def _rows(site, kinds):
    shape = (len(kinds), 256)
    site = replace(site, inputs={"x": TensorMeta(shape, torch.bfloat16, (256, 1))})
    return build_tensors(site, Values(rows=kinds), 0)["x"]


def test_gaps_hold_nan():
    shape = (4, 8)
    for layout, least in (("sliced", 31), ("padded", 24)):
        meta = TensorMeta(shape, torch.bfloat16, strides(shape, layout))
        tensor = build_tensors(Site("p", "n", {"x": meta}, {}), Values(), 0)["x"]
        assert tensor.isfinite().all()
        memory = torch.empty(0, dtype=torch.bfloat16).set_(tensor.untyped_storage())
        assert memory.isnan().sum() == memory.numel() - 32 >= least


def test_saturating_scales_make_ordinary_rows_saturate():
    pattern = PATTERNS["all_reduce_rms_norm_static_fp8"]
    site = example_site(pattern)
    for saturating, share in ((False, 0.0), (True, 0.005)):
        tensors = build_tensors(site, Values(saturating=saturating), 0)
        normed = rms_norm(tensors["x"], tensors["weight"], 1e-6)
        beyond = (normed.float() / tensors["scale"]).abs() > 448
        assert beyond.float().mean() >= share
        assert beyond.any() == saturating


@dataclass(frozen=True)
class EvenRows:
    """A stranger's requirement."""

    def unmet(self, site: Site) -> Reason | None:
        rows = site.inputs["x"].shape[0]
        return None if rows % 2 == 0 else Reason("rows", f"x has {rows} rows", "an even number")

    def __str__(self) -> str:
        return "an even number of rows"


def test_a_strangers_requirement_is_known_once_it_is_registered():
    site = example_site(PATTERN)
    with pytest.raises(NoSides, match=r"EvenRows, of which the kit does not know the two sides.*sides.register"):
        sides(EvenRows(), site)

    @sides.register
    def _(requirement: EvenRows, site: Site) -> Sides:
        def rows(count):
            x = site.inputs["x"]
            shape = (count, x.shape[-1])
            return replace(site, inputs={**site.inputs, "x": replace(x, shape=shape, stride=strides(shape))})

        return Sides((rows(2), rows(4)), (rows(1), rows(3)))

    strategy = Strategy(PATTERN.name, "a.b", PATTERN.function, requires=(EvenRows(), SizeBetween("x", 0, 5, 99)))
    assert example_site(PATTERN, strategy).inputs["x"].shape[0] == 6
    assert hypothesis.find(draw_site(PATTERN, strategy), lambda s: strategy.cannot(s, PATTERN), settings=SEARCH)


def _shift(shape, dtype):
    return {"shift": TensorMeta(shape[-1:], torch.float32, (1,)), "times": 3}


@pattern(outputs=("normed",), example=_shift)
def all_reduce_times(x: torch.Tensor, shift: torch.Tensor, times: int, *, group: str) -> torch.Tensor:
    """A stranger's pattern, with a tensor and a scalar of its own."""
    return rms_norm(all_reduce(x, group), shift, 1e-6)


def test_a_strangers_pattern_says_by_an_example_what_its_parameters_are():
    site = example_site(all_reduce_times)
    assert site.inputs["shift"] == TensorMeta((256,), torch.float32, (1,))
    assert site.attributes == {"times": 3}
    drawn = hypothesis.find(draw_site(all_reduce_times), lambda site: site.inputs["x"].shape[-1] == 20, settings=SEARCH)
    assert drawn.inputs["shift"].shape == (20,)


def test_everything_public_is_there_and_importing_the_package_brings_no_test_library():
    import subprocess
    import sys

    import fusion_core.testing

    assert sorted(fusion_core.testing.__all__) == fusion_core.testing.__all__
    for name in fusion_core.testing.__all__:
        assert getattr(fusion_core.testing, name) is not None
    code = (
        "import sys, fusion_core.testing, fusion_core.testing.jobs, fusion_core.testing.compiled\n"
        "sys.exit(repr([name for name in ('hypothesis', 'pytest') if name in sys.modules]) if "
        "{'hypothesis', 'pytest'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_subjects_are_the_strategies_of_a_backend():
    found = subjects("reference")
    sums = {"reference.symm_mem_one_shot", "reference.symm_mem_two_shot", "reference.all_reduce_in_rank_order"}
    assert sums < {str(each) for each in found}
    of_patterns = [each.pattern.name for each in found if str(each) not in sums]
    assert sorted(of_patterns) == sorted(each.name for each in CORE_PATTERNS)
    assert all(
        str(each) == each.strategy.name == f"reference.{each.pattern.name}" for each in found[: len(of_patterns)]
    )
    assert Device.here() is not None
