"""The conformance kit over the model of AITER, for each GPU in a process of its own (see `as_amd`)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import profiles

KIT = Path(__file__).with_name("kit") / "over_the_model.py"
ROOT = Path(__file__).parents[2]


def run(arch: str, options: str) -> tuple[int, str]:
    """Tests that passed, and all that was printed."""
    environment = {**os.environ, "GPU_ARCHS": arch, "FUSION_CORE_OPTIONS": options, "FUSION_CORE_STRICT": "1"}
    arguments = ["-q", "-n0", "-p", "no:cacheprovider", str(KIT)]
    profile = profiles.current()
    environment["HYPOTHESIS_PROFILE"] = profiles.KIT_OVER_A_MODEL.get(profile, profile)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), done.stdout


# gfx942 is the same code with the other FP8 dtype, which `test_seed_cases.py` and `test_model_numbers.py` run as well; and
# one-stage kernels are the same calls with another flag, which `test_calls.py` compares whole.
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("arch", "options", "count"),
    [pytest.param("gfx942", "aiter.one_stage", 312, marks=pytest.mark.nightly), ("gfx950", "", 162)],
)
def test_every_strategy_conforms(arch, options, count):
    passed, output = run(arch, options)
    assert passed == count, output  # 11 checks of each strategy, less those that do not apply
