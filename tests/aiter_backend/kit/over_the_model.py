"""The conformance kit over the model of AITER; `tests/aiter_backend/test_conforms.py` runs it for each architecture."""

from fusion_core.testing.conformance import *  # noqa: F403

BACKEND = "aiter"
ENTRY_POINT = "tests.aiter_backend.as_amd"
