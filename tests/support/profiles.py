"""How many examples hypothesis draws: every number is here.

``make test`` runs ``ci``, ``make test-nightly`` runs ``nightly``, which draws all that ``ci`` draws, and more.
"""

import os

import hypothesis

EXAMPLES = {"brief": 5, "ci": 20, "dev": 20, "thorough": 100, "nightly": 2000}
"""Profile → examples of a property, and sites of a strategy in the conformance kit."""
FIXED = ("brief", "ci", "thorough")
"""The same examples on every run: a red build is the change's own fault."""
KIT_OVER_A_MODEL = {"ci": "brief"}
"""Profile → that of the kit where kernels are a model of AITER's, once for each architecture; others: their own."""


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
