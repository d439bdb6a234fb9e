"""Where FlashInfer's strategies were measured to be faster, and so are used."""

from dataclasses import replace

import pytest

from fusion_core import Device, KnownFaster
from fusion_flashinfer import strategies
from fusion_flashinfer.limits import LIMITS, MIB, MOST, ONE_SHOT, TWO_SHOT
from tests.flashinfer_backend.sites import BF16, FP32, H100, PLAIN, STRATEGIES, is_two_shot, said, site_of
from tests.support.symbols import symbolic

pytestmark = pytest.mark.usefixtures("nothing_is_imported")


def measured(device, ranks, shape, dtype=BF16, form=""):
    """Why one form of the bare all_reduce is not known to be faster; None where it is."""
    (strategy,) = [s for s in STRATEGIES if s.name == f"flashinfer.all_reduce{form}"]
    site = replace(site_of(strategy), device=device, world_size=ranks)
    x = replace(site.inputs["x"], shape=shape, dtype=dtype, stride=None)
    reasons = [str(reason) for reason in strategy.should_not(replace(site, inputs={"x": x}))]
    return "; ".join(reasons) or None


def test_every_strategy_says_where_its_form_was_measured():
    for strategy in STRATEGIES:
        sizes = TWO_SHOT if is_two_shot(strategy) else ONE_SHOT
        assert strategy.worthwhile == (KnownFaster("x", sizes, "where it was measured to be faster"),)


@pytest.mark.parametrize("form", ["", "_two_shot", "_pdl", "_mnnvl"])
def test_what_nobody_measured_is_not_used(form):
    words = measured(Device("cuda", "sm_120"), 2, (4, 256), form=form)
    assert words == (
        "nobody has measured it to be faster on 2 ranks of cuda (sm_120), needs a measurement; fusion-core tune "
        "measures it on this machine"
    )
    words = measured(H100, 16, (4, 256), form=form)
    assert words.startswith("nobody has measured it to be faster on 16 ranks of cuda (sm_90)")


@pytest.mark.parametrize(("arch", "ranks"), LIMITS)
def test_the_largest_size_is_the_last(arch, ranks):
    limit = LIMITS[arch, ranks]
    device = Device("cuda", arch)
    assert limit.one_shot <= limit.most <= MOST
    ends = [("", 0, limit.one_shot)] + [("_two_shot", limit.one_shot, limit.most)] * (limit.one_shot < limit.most)
    for form, above, to in ends:
        first, last = above // 8192 + 1, to // 8192
        assert measured(device, ranks, (first, 4096), form=form) is None
        assert measured(device, ranks, (last, 4096), form=form) is None
        words = (
            f" on {ranks} ranks of cuda ({arch}), needs over {above / MIB:g} up to {to / MIB:g} MiB, where it was "
            "measured to be faster; fusion-core tune measures it on this machine"
        )
        too_large = f"x has {(to + 8192) / MIB:.3g} MiB"
        assert measured(device, ranks, (last + 1, 4096), form=form) == too_large + words
        assert (
            measured(device, ranks, (last // 2 + 1, 4096), FP32, form) == f"x has {(to + 16384) / MIB:.3g} MiB" + words
        )
        none = measured(device, ranks, (0, 4096), form=form)
        assert none == (f"x has 0 MiB{words}" if above else None)


def test_where_one_form_ends_the_other_begins():
    one, two = ({entry[:2]: entry[2:] for entry in sizes} for sizes in (ONE_SHOT, TWO_SHOT))
    assert one.keys() == LIMITS.keys()
    assert two.keys() == {place for place, limit in LIMITS.items() if limit.one_shot < limit.most}
    for place, (above, to) in two.items():
        assert one[place] == (0, above)
        assert to == LIMITS[place].most


def test_no_workspace_can_overflow_an_int():
    """B4: ``clear_offset * comm_size`` of the kernels. A workspace grows to the next power of two, in whole rows."""
    assert MOST & (MOST - 1) == 0
    widest_row = 65536 * 2
    assert max(strategies.WORLD_SIZES) * (MOST + widest_row) < 2**30


@pytest.mark.parametrize("rows", [4, 100000], ids=["small", "larger than any limit"])
def test_a_run_time_number_of_rows_is_accepted_and_guards_nothing(rows):
    for strategy in PLAIN:
        env, x = symbolic(rows, 256)
        # two-shot was nowhere faster on two
        site = replace(site_of(strategy), world_size=4)
        inputs = {n: x if n in ("x", "residual") else meta for n, meta in site.inputs.items()}
        site = replace(site, inputs=inputs)
        assert said(strategy, site) == []
        assert strategy.should_not(site) == (), "the choice is made when it runs"
        assert env.guards == [], "a guard would compile the graph again for other token counts"
