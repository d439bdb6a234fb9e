"""No requirement of AITER's strategies is there for nothing: what each keeps away happens over the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HAPPENS = {
    "Arch": set(),  # one machine has one architecture
    "Present": {"raised"},  # the operators take no norm without a weight
    "WorldSize": {"unfused"},  # AITER disables its communicator, and all ranks hear of it
    "DType": {"wrong", "raised"},
    "SameDType": {"wrong", "raised"},
    "MultipleOf": {"raised", "unfused"},
    # the operator has the same rule for sizes that are known when it runs, and none for a value without rows
    "RowFits": {"unfused", "raised"},
    "DTypeAttribute": {"wrong"},
    "Attribute": {"wrong", "raised"},
    "NativeFP8": {"wrong"},
    "LeastScale": {"wrong"},
    "GroupSize": {"raised"},
}
"""Class → what may happen at the sites that it refuses; at some, the strategy is right all the same."""


@pytest.mark.nightly  # both sides of each requirement are in `test_sides.py`
def test_what_a_requirement_refuses_is_wrong_or_slower():
    done = subprocess.run(
        [sys.executable, "-m", "tests.aiter_backend.without"], cwd=ROOT, env={**os.environ, "GPU_ARCHS": "gfx942"},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) > 25
    assert {name.partition(": ")[2] for name in found} == HAPPENS.keys()
    for name, happened in found.items():
        expected = HAPPENS[name.partition(": ")[2]]
        assert set(happened) - {"right"} <= expected, (name, happened)
        assert bool(set(happened) - {"right"}) == bool(expected), (name, happened)
