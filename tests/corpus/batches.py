"""Many rows to one graph: what a compilation costs depends little on how much is compiled.

Each row has tensors of its own there. A graph that cannot be compiled or run, or that has other than its rows' sites,
is given up for one graph a row: the row at fault fails by its name, and the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

import fusion_core
from fusion_core import SiteReport
from tests.corpus.case import Case, NearMiss
from tests.corpus.placing import Placed, named, placed
from tests.support.graphs import fuse

MOST = 32

Row = Case | NearMiss
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What became of one row: its sites, its results, its tensors behind the run, and what the graph has there."""

    sites: Sequence[SiteReport]
    results: Any
    inputs: tuple[Tensor, ...]
    placed: Placed


def batches(rows: Iterable[Row]) -> list[tuple[Row, ...]]:
    """Rows by the `MOST`; those with symbols for sizes apart, each kind for itself."""
    kinds: dict[object, list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.dynamic, bool(row.given.dynamic), bool(row.given.unbacked)), []).append(row)
    return [tuple(kind[at : at + MOST]) for kind in kinds.values() for at in range(0, len(kind), MOST)]


def together(rows: Sequence[Row]) -> Callable[..., Any]:
    """All rows as one function of their tensors."""
    functions = [row.function for row in rows]

    def model(*given: tuple[Tensor, ...]) -> list[Any]:
        return [function(*tensors) for function, tensors in zip(functions, given, strict=True)]

    return model


def given(rows: Sequence[Row]) -> list[tuple[Tensor, ...]]:
    """The tensors of each row, with its sizes marked."""
    return [row.given(marked=True) for row in rows]


@contextmanager
def captured() -> Iterator[None]:
    """While rows are compiled: sizes that a row reads from tensors belong to the graph."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


def compiled(rows: Sequence[Row]) -> list[Outcome]:
    """What the pass makes of rows in one graph.

    Raises:
        WrongCount: where the graph has another number of sites than the rows say, and there are several.
    """
    inputs = given(rows)
    with captured():
        fused = fuse(together(rows), *inputs, dynamic=rows[0].dynamic)
    there = placed(fused.graphs[0], fused.reports[0])
    found = zip(split(rows, fused.sites), fused.results, inputs, split(rows, there), strict=True)
    return [Outcome(*each) for each in found]


def explained(rows: Sequence[Row]) -> list[Placed]:
    """What a dry run names in each row."""
    with torch.no_grad(), captured():
        report = fusion_core.explain(together(rows), *given(rows), dynamic=rows[0].dynamic)
    return split(rows, named(report))


class WrongCount(Exception):
    """A graph of several rows whose sites cannot be told apart."""


def split(rows: Sequence[Row], found: Sequence[Any]) -> list[Any]:
    """The sites of a graph row by row, in whose order they are.

    Raises:
        WrongCount: as `compiled` says.
    """
    if len(rows) == 1:
        return [found]
    counts = [len(row.others[0]) + 1 + len(row.others[1]) for row in rows]
    if sum(counts) != len(found):
        raise WrongCount(f"found {len(found)} sites in a graph of {len(rows)} rows, needs {sum(counts)}")
    ends = [sum(counts[: place + 1]) for place in range(len(counts))]
    return [found[end - count : end] for end, count in zip(ends, counts, strict=True)]


class ByRow(Generic[T]):
    """What is found of each row, in one go for all the rows of its batch when it is first asked for."""

    def __init__(self, rows: Iterable[Row], find: Callable[[Sequence[Row]], Sequence[T]]) -> None:
        self.find = find
        self.batches = batches(rows)
        self.given_up: dict[str, str] = {}
        self._batch = {id(row): batch for batch in self.batches for row in batch}
        self._found: dict[int, T] = {}

    def __getitem__(self, row: Row) -> T:
        batch = self._batch[id(row)]
        if id(row) not in self._found and batch[0].name not in self.given_up:
            try:
                self._found |= {id(each): found for each, found in zip(batch, self.find(batch), strict=True)}
            except Exception as error:  # noqa: BLE001  # whatever it is, one of the rows is at fault
                self.given_up[batch[0].name] = repr(error)
        if id(row) not in self._found:
            (self._found[id(row)],) = self.find([row])
        return self._found[id(row)]
