"""One way in which a strategy's kernel can be launched, as a declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion_core.plugins.requirements import Requirement


@dataclass(frozen=True)
class Variant:
    """One way to launch a strategy's kernel: what it adds to, or replaces in, the declaration of its `Strategy`.

    A variant is chosen, measured, tested and reported by its own name, like a strategy without variants.

    Attributes:
        name: The suffix of its name after the strategy's name and an underscore, e.g. ``"two_shot"`` in
            ``"acme.norm_two_shot"``; empty for the variant that has the strategy's own name.
        arguments: Values of parameters of ``impl`` that the pattern does not have, by name: numbers, text, True, False
            or None. They are given to ``impl`` at each call, besides those of the strategy.
        requires: What makes it correct, besides the strategy's own.
        worthwhile: What makes it faster than the unfused path, besides the strategy's own.
        outputs: What it returns; None for what the strategy returns.
        impl: What it runs; None for the strategy's ``impl``.
        rank: Added to the strategy's.
        option: An option that it needs; None for the strategy's.
        batch_invariant: Whether it gives a row the same bits in every batch; always so if the strategy declares it.
        untested: Why it has not been run on hardware yet, in addition to the strategy's own reason; None if it has.

    Example:
        >>> from fusion_core import MultipleOf, Strategy, WorldSize
        >>> def impl(x, *, group: str, two_shot: bool = False): ...
        >>> sizes = (Variant("", requires=(WorldSize(2, 4, 8),)), Variant("two_shot", {"two_shot": True}, rank=-1))
        >>> norm = Strategy("all_reduce", "acme.sum", impl, (MultipleOf("x", -1, 8),), variants=sizes)
        >>> for each in norm.expanded():
        ...     print(each.name, each.rank, "; ".join(map(str, each.requires)))
        acme.sum 0 x.shape[-1] a multiple of 8; world size 2, 4 or 8
        acme.sum_two_shot -1 x.shape[-1] a multiple of 8
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    requires: tuple[Requirement, ...] = ()
    worthwhile: tuple[Requirement, ...] = ()
    outputs: tuple[str, ...] | None = None
    impl: Callable[..., Any] | None = None
    rank: int = 0
    option: str | None = None
    batch_invariant: bool = False
    untested: str | None = None
