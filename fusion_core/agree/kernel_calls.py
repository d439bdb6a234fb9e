"""Agreement of a group's ranks that they run the same kernels, reached before the first kernel of a graph runs.

A plain all_reduce pairs with any other of its size, whatever graph it comes from. A kernel pairs only with itself: one
that meets another rank's all_reduce waits forever, or adds unrelated tensors. Each rank decides by its own graph, and
graphs may differ: a graph break, other dynamic shapes, Dynamo's recompile limit, a trace that fails or a requirement
that is met on one rank alone. So before the first kernel of a graph runs, each rank publishes the graph's sequence of
collectives in the group's store. If all sequences are equal, the kernels run, and the sequence is not compared again.
If they differ, or a rank publishes nothing in time, every kernel of the group runs unfused from then on: as
all_reduces, which pair.

A rank that does not answer after kernels were agreed on may be inside one of them. Nothing pairs with that kernel, so
the ranks that wait raise `RanksDiffer`.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist

from fusion_core.agree.agreement import Agreement, NoAgreement
from fusion_core.errors import RanksDiffer
from fusion_core.fallback import fell_back
from fusion_core.groups import global_ranks, is_shared, resolved
from fusion_core.reason import Reason

TIMEOUT = 300.0
"""Seconds that the first kernel of a graph waits for the other ranks."""

CODE = "agreement"
SAME = "the same graph on every rank"


@dataclass(frozen=True)
class Calls:
    """The collectives of one graph in one process group.

    Attributes:
        digest: A hash of their sequence: kinds, dtypes, shapes, and the identity of each kernel.
        words: The kernels, for messages.
    """

    digest: str
    words: str

    @classmethod
    def of(cls, sequence: Sequence[str], words: str) -> Calls:
        """The calls of a sequence of collectives, each a text that is equal on all ranks."""
        return cls(hashlib.sha256("\n".join(sequence).encode()).hexdigest()[:16], words)

    def text(self) -> str:
        """As JSON."""
        return json.dumps([self.digest, self.words], separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Calls:
        """The calls that `text` serialized."""
        return cls(*json.loads(text))


@dataclass(eq=False)
class GroupCalls:
    """What the ranks of one process group have agreed to run.

    Attributes:
        group: The group.
        name: Its name.
        agreed: Digests of the sequences that all ranks run.
        unfused: Why no kernel of the group runs any more; None while kernels may run.
        error: The error that each further kernel of the group raises; None if there is none.
        steps: The number of exchanges between its ranks so far.
    """

    group: weakref.ref[dist.ProcessGroup]
    name: str
    agreed: set[str] = field(default_factory=set)
    unfused: Reason | None = None
    error: RanksDiffer | None = None
    steps: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hindrance(self, calls: Calls, strategies: Sequence[str]) -> Reason | None:
        """The reason why the kernels of a graph must not run, or None. Waits for the other ranks the first time.

        Args:
            calls: The graph's collectives in this group.
            strategies: Strategies whose reports then record that they run unfused.

        Raises:
            RanksDiffer: if another rank does not answer and may be inside a kernel.
        """
        if self.unfused is None and self.error is None and calls.digest not in self.agreed:
            with self._lock:
                if self.unfused is None and self.error is None and calls.digest not in self.agreed:
                    self._settle(calls)
        if self.error is not None:
            raise self.error
        if self.unfused is not None:
            for strategy in strategies:
                fell_back(strategy, self.name, self.unfused)
        return self.unfused

    def may_be_inside(self, silent: Reason) -> RanksDiffer | None:
        """The error for ranks that waited in vain; None if the missing rank cannot be inside a kernel."""
        words = f"{silent}: that rank may be inside a kernel that was agreed on before, with which nothing pairs"
        return RanksDiffer(words) if self.agreed else None

    def _settle(self, calls: Calls) -> None:
        group = self.group()
        assert group is not None
        ranks = global_ranks(group)
        answers = self._exchange(group, calls, ranks)
        if isinstance(answers, Reason):
            silent = Reason(CODE, f"{calls.words}: {answers.found}", SAME, hint=answers.hint)
            self.error = self.may_be_inside(silent)
            self.unfused = silent
        elif (
            answers[group.rank()].digest != calls.digest
        ):  # it was interrupted, and the others have its earlier announcement
            before = answers[group.rank()].words
            self.error = RanksDiffer(f"this rank runs {calls.words}, and announced {before} before; needs {SAME}")
        elif other := next((rank for rank, each in enumerate(answers) if each.digest != answers[0].digest), None):
            found = f"rank {ranks[0]} runs {answers[0].words}, rank {ranks[other]} runs {answers[other].words}"
            self.unfused = Reason(CODE, found, SAME)
        else:
            self.agreed.add(calls.digest)
        if self.unfused is not None and self.error is None:
            words = f"fusion_core: process group {self.name!r} runs unfused from now on: {self.unfused}"
            warnings.warn(words, RuntimeWarning, stacklevel=2)

    def _exchange(self, group: dist.ProcessGroup, calls: Calls, ranks: Sequence[int]) -> list[Calls] | Reason:
        """The calls of every rank, or the reason why they are not known."""
        try:
            agreement = Agreement(group, f"the first kernel of a graph (step {self.steps})", TIMEOUT, ranks)
            agreement.publish([calls.digest, calls.words])
        except NoAgreement as error:
            if error.reason.code != CODE:
                raise
            return error.reason  # the others wait in vain, and go on unfused as well
        outcome = agreement.collect()  # a store that fails now raises: the others may know what this rank does not
        # only now: a rank that was interrupted retries with the same number
        self.steps += 1
        return outcome if isinstance(outcome, Reason) else [Calls(*each) for each in outcome]


_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupCalls] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def calls_of(name: str) -> GroupCalls | None:
    """What the ranks of a group have agreed to run; None for a group without other ranks."""
    group = resolved(name)
    if group is None:
        return None
    found = _of_group.get(group)  # without the lock: every kernel call takes this path
    if found is None and is_shared(group):
        with _lock:
            found = _of_group.setdefault(group, GroupCalls(weakref.ref(group), name))
    return found
