"""What FlashInfer's strategies accept; no GPU and no FlashInfer is needed."""

import math
from dataclasses import replace

import pytest

from fusion_flashinfer.limits import TWO_SHOT
from fusion_flashinfer.requirements import MulticastAllowed
from tests.flashinfer_backend.sites import (
    BF16,
    FP16,
    FP32,
    PATTERNS,
    PLAIN,
    STRATEGIES,
    given,
    is_two_shot,
    kernel_of,
    many_registers,
    said,
    site_of,
    sized,
    typed,
)

pytestmark = pytest.mark.usefixtures("nothing_is_imported")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.name)
def test_every_strategy_has_a_site_that_it_can_and_should_run(strategy):
    if strategy.option == "mnnvl":
        strategy = replace(
            strategy, requires=tuple(r for r in strategy.requires if not isinstance(r, MulticastAllowed))
        )
    site = site_of(strategy)
    assert said(strategy, site) == []
    if is_two_shot(strategy):
        ranks, above = next((ranks, above) for arch, ranks, above, _ in TWO_SHOT if arch == site.device.arch)
        site = replace(sized(site, above // 512 + 1, 256), world_size=ranks)
        assert said(strategy, site) == []
    assert strategy.should_not(site) == ()


ACCEPTED = {
    "float16": lambda site: typed(site, FP16),
    "a weight bias, as Gemma has it": lambda site: given(site, weight_bias=1.0) if "weight" in site.inputs else site,
    "no rows": lambda site: sized(site, 0, 256),
    "one dimension": lambda site: sized(site, 256),
    "four dimensions": lambda site: sized(site, 2, 3, 4, 256),
    "hidden 7168": lambda site: sized(site, 4, 7168),
    "hidden 65536, the largest": lambda site: sized(site, 4, 65536),
    "four ranks": lambda site: replace(site, world_size=4),
    "eight ranks": lambda site: replace(site, world_size=8),
    "more rows than eight ranks": lambda site: replace(sized(site, 3, 3, 256), world_size=8),
    "another rounding of the norm that only the quantisation reads": lambda site: (
        given(site, norm_dtype=FP32) if "quantized" in site.outputs and "normed" not in site.outputs else site
    ),
    "attributes as the kernel has them": lambda site: given(
        site,
        **{
            name: value
            for name, value in {"fp8_max": 448.0, "residual_dtype": BF16, "norm_dtype": BF16}.items()
            if name in PATTERNS[site.pattern].parameters
        },
    ),
    "memory that is not contiguous, which the operator copies": lambda site: replace(
        site, inputs={**site.inputs, "x": replace(site.inputs["x"], stride=(1, 4))}
    ),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("strategy", PLAIN, ids=lambda s: s.name)
def test_accepted(strategy, change):
    site = change(site_of(strategy))
    rows, ranks = math.prod(site.inputs["x"].shape[:-1]), site.world_size
    too_few = is_two_shot(strategy) and 0 < rows <= ranks
    expected = [f"x has {rows} rows, needs more than the {ranks} ranks"] if too_few else []
    if many_registers(strategy) and site.inputs["x"].shape[-1] == 65536:
        expected.append("x.shape[-1] is 65536, which takes 1024 threads to a block, needs at most 512")
    assert said(strategy, site) == expected


@pytest.mark.parametrize("hidden", [64, 2880])
def test_rows_that_are_no_whole_number_of_warps(hidden):
    """Partial warps were wrong in releases before 0.6.15 (T9); multiples of 128 are the group kernel's own rule."""
    for strategy in PLAIN:
        words = said(strategy, sized(site_of(strategy), 4, hidden)) if "group" not in strategy.name else []
        assert words == []


def test_float32_where_nothing_is_quantised():
    for strategy in [s for s in PLAIN if not kernel_of(s).quantization]:
        site = typed(site_of(strategy), FP32)
        assert said(strategy, site) == []
        assert said(strategy, sized(site, 4, 32768)) == []
        assert said(strategy, sized(site, 4, 65536)) == [
            "x.shape[-1] is 65536, which takes 2048 threads to a block, needs at most 1024"
        ]
