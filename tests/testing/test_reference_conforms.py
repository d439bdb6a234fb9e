from collections.abc import Iterator

import hypothesis
import pytest

from fusion_core.testing.conformance import *  # noqa: F403
from tests.support import profiles

BACKEND = "reference"


@pytest.fixture(autouse=True)
def _fewer_where_another_strategy_has_the_same_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    """A strategy without a residual takes the steps of the one with it, but for one addition."""
    subject = getattr(request.node, "callspec", None) and request.node.callspec.params.get("subject")
    repeated = "all_reduce_rms_norm_" in str(subject) and "all_reduce_rms_norm_add" not in str(subject)
    name = profiles.current()
    hypothesis.settings.load_profile(profiles.REPEATED.get(name, name) if repeated else name)
    yield
    hypothesis.settings.load_profile(name)
