"""For tests of what is known without FlashInfer: that they do not import it."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture
def nothing_is_imported() -> Iterator[None]:
    before = "flashinfer" in sys.modules
    yield
    assert ("flashinfer" in sys.modules) == before
