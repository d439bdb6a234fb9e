import pytest

from fusion_core.testing.conformance import *  # noqa: F403

BACKEND = "reference"

# without GPUs tests/testing/test_reference_conforms.py is the same
pytestmark = [pytest.mark.cuda(devices=2), pytest.mark.slow]
