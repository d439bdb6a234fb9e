"""Counts the collectives that reach the process group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch


def reaching_the_group(run: Callable[[], Any]) -> Counter[str]:
    """The collectives that gloo runs during a call, counted by the events of its C++ code."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return Counter({e.key.removeprefix("gloo:"): e.count for e in profile.key_averages() if e.key.startswith("gloo:")})
