import pytest

from fusion_core.testing.conformance import *  # noqa: F403

BACKEND = "flashinfer"

pytestmark = pytest.mark.slow
