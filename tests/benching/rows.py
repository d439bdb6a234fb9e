"""Rows for tests, of what was never measured."""

import dataclasses

from fusion_core.bench.result import Fusion, Row

FUSION = Fusion(8, 8, {"acme.one_shot": 8}, (), ())


def row(**changes):
    made = Row(8, (120.0, 110.0, 115.0), (100.0, 100.0, 100.0), FUSION, 0.01, 0.1, 0.0, True, 40, {"plain": 1.0}, 0)
    return dataclasses.replace(made, **changes)
