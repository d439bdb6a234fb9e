"""Where AITER's strategies are known to be faster, and so are used."""

from dataclasses import replace

import pytest

from fusion_core import Device
from tests.aiter_backend.sites import PLAIN, said, should_not, site_of, sized
from tests.support.symbols import symbolic

pytestmark = pytest.mark.usefixtures("nothing_is_imported")


def test_more_than_64_mib_is_left_to_rccl():
    for strategy in PLAIN:
        site = site_of(strategy)
        assert should_not(strategy, sized(site, 4096, 8192)) == []
        (words,) = should_not(strategy, sized(site, 8192, 8192))
        assert words == (
            "x has 128 MiB on 2 ranks of cuda (gfx950), needs over 0 up to 64 MiB, as AITER's own callers have it; "
            "fusion-core tune measures it on this machine"
        )
        assert said(strategy, sized(site, 8192, 8192)) == [], "right it would be"


@pytest.mark.parametrize("rows", [4, 100000], ids=["small", "larger than any limit"])
def test_a_run_time_number_of_rows_guards_nothing(rows):
    for strategy in PLAIN:
        env, x = symbolic(rows, 512)
        site = site_of(strategy)
        site = replace(site, inputs={n: x if n in ("x", "residual") else meta for n, meta in site.inputs.items()})
        assert said(strategy, site) == []
        assert should_not(strategy, site) == [], "the choice is made when it runs"
        assert env.guards == [], "a guard would compile the graph again for other token counts"


def test_what_nobody_has_measured_is_not_used():
    site = site_of(PLAIN[0])
    for changed in (replace(site, world_size=16), replace(site, device=Device("cuda", "sm_90"))):
        (words,) = should_not(PLAIN[0], changed)
        assert words == (
            f"nobody has measured it to be faster on {changed.world_size} ranks of {changed.device}, needs a "
            "measurement; fusion-core tune measures it on this machine"
        )
