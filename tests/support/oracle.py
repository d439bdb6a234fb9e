"""Examples of one of the reference backend's strategies against float64."""

from fusion_core.testing import CHECKS, subjects
from tests.support import profiles


def check_examples(pattern: str) -> None:
    """200 examples, 2,000 in the nightly run: the check makes twice as many as it is given."""
    number = 1000 if profiles.current() == "nightly" else 100
    (subject,) = (each for each in subjects("reference", examples=number) if each.name == f"reference.{pattern}")
    (check,) = (each for each in CHECKS if each.name == "equals_the_oracle_where_it_accepts")
    check.run(subject)
