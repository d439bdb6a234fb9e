"""FlashInfer's declarations changed for a test: which of a kernel's two forms is used, and at which sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from fusion_core import KnownFaster, Strategy, dynamo
from fusion_core.dispatch import named
from fusion_flashinfer import strategies


@contextmanager
def only(*, two_shot: bool) -> Iterator[None]:
    """One form, at every size."""
    declared = [each for each in variants() if is_two_shot(each) == two_shot]
    with _declared(replace(each, worthwhile=()) for each in declared):
        yield


@contextmanager
def faster(one_shot: int, most: int, arch: str, ranks: int) -> Iterator[None]:
    """One-shot known to be faster up to so many bytes, and two-shot from there on up to ``most``."""
    sizes = {False: ((arch, ranks, 0, one_shot),), True: ((arch, ranks, one_shot, most),)}
    known = {form: (KnownFaster("x", each, "as said"),) for form, each in sizes.items()}
    with _declared(replace(each, worthwhile=known[is_two_shot(each)]) for each in variants()):
        yield


def variants() -> list[Strategy]:
    """Every kernel in every form."""
    return [each for strategy in strategies.STRATEGIES for each in strategy.expanded()]


def is_two_shot(strategy: Strategy) -> bool:
    return "_two_shot" in strategy.name


@contextmanager
def _declared(found: Iterable[Strategy]) -> Iterator[None]:
    with mock.patch.object(strategies, "STRATEGIES", tuple(found)):
        _forget()
        try:
            yield
        finally:
            _forget()


def _forget() -> None:
    """Both keep what was declared; the second one in a rank that takes a graph from Inductor's cache."""
    dynamo._pass_for.cache_clear()
    named._installed.cache_clear()
