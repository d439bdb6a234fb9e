"""The conformance kit over the model of AITER, for each GPU in a process of its own (see `as_amd`)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).with_name("kit") / "over_the_model.py"
ROOT = Path(__file__).parents[2]


def run(arch: str, *, options: str = "", profile: str | None = None, select: str = "") -> tuple[int, str]:
    """Tests that passed, and all that was printed."""
    environment = {**os.environ, "GPU_ARCHS": arch, "FUSION_CORE_OPTIONS": options, "FUSION_CORE_STRICT": "1"}
    if profile is not None:
        environment["HYPOTHESIS_PROFILE"] = profile
    arguments = ["-q", "-n0", "-p", "no:cacheprovider", *(("-k", select) if select else ()), str(KIT)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) passed", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "profile"), [("gfx942", "ci"), ("gfx950", "dev")])
def test_every_strategy_conforms(arch, profile):
    # on gfx942, where the kernels truncate, results come nearer to their bounds
    passed, output = run(arch, profile=os.environ.get("HYPOTHESIS_PROFILE", profile))
    assert passed == 162, output  # 11 checks of 15 strategies, less those that do not apply


@pytest.mark.slow
def test_kernels_of_one_stage_conform_on_gfx942_where_the_user_asks_for_them():
    passed, output = run("gfx942", options="aiter.one_stage", profile=os.environ.get("HYPOTHESIS_PROFILE", "dev"), select="one_stage")  # fmt: skip
    assert passed == 150, output
