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


def run(arch: str, options: str, which: str) -> tuple[int, list[str]]:
    """Tests that passed, and why others were skipped."""
    environment = {**os.environ, "GPU_ARCHS": arch, "FUSION_CORE_OPTIONS": options, "FUSION_CORE_STRICT": "1"}
    arguments = ["-q", "-n0", "-p", "no:cacheprovider", "-k", which, str(KIT)]
    profile = profiles.current()
    environment["HYPOTHESIS_PROFILE"] = profiles.KIT_OVER_A_MODEL.get(profile, profile)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), re.findall(r"^SKIPPED \[\d+\] \S+ (.*)", done.stdout, re.MULTILINE)


# gfx942 is the same code with the other FP8 dtype, which `test_seed_cases.py` and `test_model_numbers.py` run as well; and
# one-stage kernels are the same calls with another flag, which `test_calls.py` compares whole.
NOT_HERE = (
    "it is not declared batch-invariant",
    "fusion_core does not find all_reduce_rms_norm_mxfp4 in compiled graphs yet",
    "fusion_core does not find all_reduce_add_rms_norm_mxfp4 in compiled graphs yet",
)
SHARED = re.compile(r"^aiter\.\w+ has the workspaces of aiter\.\w+, which are looked at there$")
"""Faults of a workspace are tried with the first strategy that has it."""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("arch", "options", "which", "least"),
    [
        # what fails on one rank has tests of its own, on more kinds of failures: `test_communicator_failures.py`
        (
            "gfx950",
            "",
            "(aiter.all_reduce] or add_rms_norm_group_fp8]) and not goes_on_where_a_workspace_fails",
            22,
        ),
        pytest.param("gfx950", "", "", 150, marks=pytest.mark.nightly),
        pytest.param("gfx942", "aiter.one_stage", "", 150, marks=pytest.mark.nightly),
    ],
)
def test_every_strategy_conforms(arch, options, which, least):
    passed, skipped = run(arch, options, which)
    assert passed >= least
    assert not [why for why in skipped if not (why.startswith(NOT_HERE) or SHARED.search(why))]
