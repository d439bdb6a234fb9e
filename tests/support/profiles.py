"""The numbers of examples that hypothesis draws, all in one place.

``make test`` runs ``ci``, ``make test-nightly`` runs ``nightly``, which draws more examples.
"""

import os

import hypothesis

EXAMPLES = {"brief": 5, "ci": 20, "dev": 20, "thorough": 100, "nightly": 2000}
"""Profile → examples per property, and sites per strategy in the conformance kit."""
FIXED = ("brief", "ci", "thorough")
"""Profiles with the same examples on every run, so that a failure is caused by the change under test."""
KIT_OVER_A_MODEL = {"ci": "brief"}
"""Profile → the profile of the kit on a model of AITER's kernels, run once per architecture; default: the same."""

REPEATED = {"ci": "brief"}
"""Profile → the profile of the kit on a strategy where another one has the same steps and one more; default: the same."""


def load() -> None:
    """Register every profile, and load the one that ``HYPOTHESIS_PROFILE`` names."""
    for name, number in EXAMPLES.items():
        hypothesis.settings.register_profile(
            name,
            derandomize=name in FIXED,
            deadline=None,  # the first example often compiles
            max_examples=number,
            suppress_health_check=[hypothesis.HealthCheck.too_slow],
            print_blob=name == "nightly",
        )
    hypothesis.settings.load_profile(current())


def current() -> str:
    """The name of the profile in use."""
    return os.environ.get("HYPOTHESIS_PROFILE", "ci")
