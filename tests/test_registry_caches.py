"""What other modules keep for a registry goes with it."""

import gc
import weakref
from dataclasses import replace

from fusion_core import Device, FusionConfig, Registry
from fusion_core.agree import ranks
from fusion_core.decide import token_ranges
from fusion_core.tables.store import Found


def test_two_registries_of_one_content_are_told_apart_and_nothing_outlives_them() -> None:
    registry = Registry.load(FusionConfig(order=("reference",)))
    other = replace(registry)
    assert registry != other
    _, words = ranks._facts(registry, Device("cpu"), Found(None))
    assert ranks._facts(other, Device("cpu"), Found(None))[1] == words
    token_ranges._known[registry] = {}
    assert registry in ranks._local
    assert other in ranks._local
    gone = weakref.ref(registry)
    del registry
    gc.collect()
    assert gone() is None
    assert list(ranks._local).count(other) == 1
