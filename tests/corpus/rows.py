"""All rows of the corpus, by their names."""

import pytest

from tests.corpus import (
    all_reduces,
    layer_norms,
    near_misses,
    norms,
    quantisation,
    quantisation_near_misses,
    residuals,
    shapes,
)

TOPICS = (norms, layer_norms, residuals, all_reduces, quantisation, shapes, near_misses)
CASES = [
    pytest.param(case, id=f"{topic.__name__.rpartition('.')[2]}: {case.name}")
    for topic in TOPICS
    for case in topic.CASES
]
_MISSES = [*near_misses.NEAR_MISSES, *quantisation_near_misses.NEAR_MISSES]
NEAR_MISSES = [pytest.param(miss, id=miss.name) for miss in _MISSES]
ROWS = [*(case for topic in TOPICS for case in topic.CASES), *_MISSES]
