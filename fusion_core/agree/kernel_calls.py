"""Whether the ranks of a group run the same kernels, agreed before the first kernel of a graph runs.

A plain all_reduce pairs with any other of its size, whatever graph it comes from. A kernel pairs with itself alone: one
that meets another rank's all_reduce waits for ever, or adds what does not belong together. Each rank decides by its own
graph, and graphs may differ: a graph break, other dynamic shapes, Dynamo's recompile limit, a trace that fails or a
requirement that is met on one rank alone. So before the first kernel of a graph runs, each rank says through the
group's store in which sequence of collectives it stands. Where all say the same, the kernels run, and nothing is asked
of that sequence again. Where they do not, or one says nothing in time, every kernel of the group runs unfused from then
on: all_reduces, which pair.

A rank that is silent after kernels were agreed on may be inside one of them. Nothing pairs with that, so the ranks that
wait raise `RanksDiffer`.
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
from fusion_core.groups import global_ranks, is_shared, resolved
from fusion_core.reason import Reason
from fusion_core.run_time import fell_back

TIMEOUT = 300.0
"""Seconds that the first kernel of a graph waits for the other ranks."""

CODE = "agreement"
SAME = "the same graph on every rank"


@dataclass(frozen=True)
class Calls:
    """The collectives of one graph in one process group.

    Attributes:
        digest: Of their sequence: kinds, dtypes, shapes, and what each kernel is.
        words: Which kernels, for people.
    """

    digest: str
    words: str

    @classmethod
    def of(cls, sequence: Sequence[str], words: str) -> Calls:
        """The calls of a sequence of collectives, each as a text that is equal on all ranks."""
        return cls(hashlib.sha256("\n".join(sequence).encode()).hexdigest()[:16], words)

    def text(self) -> str:
        """As JSON."""
        return json.dumps([self.digest, self.words], separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Calls:
        """The calls that `text` gave."""
        return cls(*json.loads(text))


@dataclass(eq=False)
class GroupCalls:
    """What the ranks of one process group have agreed to run.

    Attributes:
        group: The group.
        name: Its name.
        agreed: Digests of the sequences that all ranks run.
        unfused: Why no kernel of the group runs any more; None where they may.
        error: Raised by each further kernel of the group.
        steps: How often its ranks have agreed.
    """

    group: weakref.ref[dist.ProcessGroup]
    name: str
    agreed: set[str] = field(default_factory=set)
    unfused: Reason | None = None
    error: RanksDiffer | None = None
    steps: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hindrance(self, calls: Calls, strategies: Sequence[str]) -> Reason | None:
        """Why the kernels of a graph must not run; None where they may. Waits for the other ranks the first time.

        Args:
            calls: The graph's collectives in this group.
            strategies: Those whose reports then say that they run unfused.

        Raises:
            RanksDiffer: where another rank is silent and may be inside a kernel.
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
        """The error of a rank that waited for one in vain; None where no kernel has run that it may be inside."""
        words = f"{silent}: that rank may be inside a kernel that was agreed on before, with which nothing pairs"
        return RanksDiffer(words) if self.agreed else None

    def _settle(self, calls: Calls) -> None:
        group = self.group()
        assert group is not None
        ranks = global_ranks(group)
        said = self._exchange(group, calls, ranks)
        if isinstance(said, Reason):
            silent = Reason(CODE, f"{calls.words}: {said.found}", SAME, hint=said.hint)
            self.error = self.may_be_inside(silent)
            self.unfused = silent
        elif said[group.rank()].digest != calls.digest:  # it was interrupted, and the others have what it said before
            before = said[group.rank()].words
            self.error = RanksDiffer(
                f"this rank runs {calls.words}, and said before that it runs {before}; needs {SAME}"
            )
        elif other := next((rank for rank, each in enumerate(said) if each.digest != said[0].digest), None):
            found = f"rank {ranks[0]} runs {said[0].words}, rank {ranks[other]} runs {said[other].words}"
            self.unfused = Reason(CODE, found, SAME)
        else:
            self.agreed.add(calls.digest)
        if self.unfused is not None and self.error is None:
            words = f"fusion_core: process group {self.name!r} runs unfused from now on: {self.unfused}"
            warnings.warn(words, RuntimeWarning, stacklevel=2)

    def _exchange(self, group: dist.ProcessGroup, calls: Calls, ranks: Sequence[int]) -> list[Calls] | Reason:
        """What every rank runs; why that is not known."""
        try:
            agreement = Agreement(group, f"the first kernel of a graph (step {self.steps})", TIMEOUT, ranks)
            agreement.publish([calls.digest, calls.words])
        except NoAgreement as error:
            if error.reason.code != CODE:
                raise
            return error.reason  # the others wait in vain, and go on unfused as well
        outcome = agreement.collect()  # a store that fails now raises: the others may know what this rank does not
        # only now: a rank that was interrupted comes again with the same number
        self.steps += 1
        return outcome if isinstance(outcome, Reason) else [Calls(*each) for each in outcome]


_of_group: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupCalls] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def calls_of(name: str) -> GroupCalls | None:
    """What the ranks of a group have agreed to run; None of a group without other ranks."""
    group = resolved(name)
    if group is None:
        return None
    found = _of_group.get(group)  # first: each call of a kernel comes by here
    if found is None and is_shared(group):
        with _lock:
            found = _of_group.setdefault(group, GroupCalls(weakref.ref(group), name))
    return found
