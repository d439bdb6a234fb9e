"""Spellings put together from parts: every choice is independent. A wrong turn exchanges one part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.corpus.case import ADD, BARE, PLAIN, reduce
from tests.corpus.parts import INVERSES, MEANS, NARROW_PRODUCTS, PRODUCTS, RESIDUALS, SHIFTS, UNROUNDED, VIEWS, WEIGHTS
from tests.corpus.quantised import Quantisation, quantised
from tests.corpus.wrong_turns import QUANTISATION_TURNS, RESIDUAL_TURNS, ROOT_TURNS, VALUE_TURNS


@dataclass(frozen=True)
class Spelling:
    """A place in a model, part by part.

    Attributes:
        residual: A part of `RESIDUALS`, `UNROUNDED`, or None for a norm of the reduced sum itself.
        mean: A part of `MEANS`.
        shift: A part of `SHIFTS`.
        eps: Added to the mean of squares.
        inverse: A part of `INVERSES`.
        narrow: A part of `NARROW_PRODUCTS`.
        product: A part of `PRODUCTS`.
        weight: A part of `WEIGHTS`, or None for no weight.
        cast: One of `CASTS`.
        double: Computed in float64 instead of float32, where the norm is rounded at its end.
        view: A part of `VIEWS`.
        quantisation: Of the norm; None for none.
        live: The outputs that the place returns.
        dtype: Of the tensors.
        wrong: A wrong turn of `WRONG`; None for a spelling that must be found.
    """

    residual: str | None = "r + a"
    mean: str = "pow(2).mean"
    shift: str = "v + eps"
    eps: float = 1e-5
    inverse: str = "rsqrt"
    narrow: str = "x * root"
    product: str = "(x * root) * w"
    weight: str | None = "w"
    cast: str = "round, weigh"
    double: bool = False
    view: str = "none"
    quantisation: Quantisation | None = None
    live: tuple[str, ...] = ("normed",)
    dtype: torch.dtype = torch.bfloat16
    wrong: str | None = None

    @property
    def norm_pattern(self) -> str:
        """The pattern without the quantisation."""
        return PLAIN if self.residual is None else ADD

    @property
    def pattern(self) -> str:
        """The pattern that stands there, wrong turns aside."""
        return f"{self.norm_pattern}_{self.quantisation.kind}_fp8" if self.quantisation else self.norm_pattern

    @property
    def attributes(self) -> dict[str, Any]:
        """What the site has beside the usual."""
        narrow = self.dtype is not torch.float32
        wide = narrow and self.cast in ("round, weigh in float32", "never round") and self.weight is not None
        wide |= narrow and self.cast == "never round"
        return {
            "eps": self.eps,
            "weight_bias": WEIGHTS[self.weight][0] if self.weight else 0.0,
            "norm_dtype": torch.float32 if wide else None,
            "weight_after_cast": narrow and self.weight is not None and self.cast.startswith("round"),
            "norm_of_unrounded_sum": narrow and self.residual == UNROUNDED,
            **(self.quantisation.attributes if self.quantisation and self.stands == self.pattern else {}),
        }

    @property
    def stands(self) -> str:
        """The pattern that is found."""
        return WRONG[self.wrong].stands(self) if self.wrong else self.pattern

    def __call__(self, x: Tensor, r: Tensor, w: Tensor, s: Tensor) -> dict[str, Tensor]:
        """The live outputs by name."""
        reduced = reduce(x, "max" if self.wrong == "all_reduce(max)" else "sum")
        values = {"reduced": reduced}
        wide = hidden = self._turned("reduced", reduced)
        if self.residual is not None and self.wrong in RESIDUAL_TURNS:
            wide = hidden = RESIDUAL_TURNS[self.wrong](reduced, r)
        elif self.residual == UNROUNDED:
            wide = hidden.float() + r.float()
            hidden = wide.to(x.dtype)
        elif self.residual is not None:
            wide = hidden = RESIDUALS[self.residual](hidden, r)
        values["residual_out"] = hidden
        before, behind = VIEWS[self.view]
        normed = behind(self._norm(before(self._turned("hidden", wide)), w, x.dtype), hidden)
        values["normed"] = normed
        if self.quantisation:
            values |= self._quantise(normed, s)
        return {name: values[name] for name in self.live}

    def _turned(self, where: str, value: Tensor) -> Tensor:
        turns = VALUE_TURNS[where]
        return turns[self.wrong](value) if self.wrong in turns else value

    def _norm(self, h: Tensor, w: Tensor, dtype: torch.dtype) -> Tensor:
        wide = h.double() if self.double else h.float()
        if self.wrong in ROOT_TURNS:
            root = ROOT_TURNS[self.wrong](wide, self.eps)
        else:
            root = INVERSES[self.inverse](SHIFTS[self.shift](MEANS[self.mean](wide), self.eps))
        if self.wrong == "minus the mean":
            wide = wide - wide.mean(-1, keepdim=True)
        product = NARROW_PRODUCTS[self.narrow]
        if self.weight is None:
            normed = product(wide, root)
            return normed if self.cast == "never round" else normed.to(dtype)
        weigh = WEIGHTS[self.weight][1]
        if self.cast in ("weigh, round", "never round"):
            normed = PRODUCTS[self.product](wide, root, weigh(w.to(wide.dtype)))
            return normed if self.cast == "never round" else normed.to(dtype)
        normed = product(wide, root).to(dtype)
        if self.cast == "round, weigh":
            return weigh(w) * normed
        normed = normed * weigh(w.float())
        return normed if self.cast == "round, weigh in float32" else normed.to(dtype)

    def _quantise(self, n: Tensor, s: Tensor) -> dict[str, Tensor]:
        assert self.quantisation is not None
        if self.wrong in QUANTISATION_TURNS:
            return QUANTISATION_TURNS[self.wrong](self.quantisation, n, s)
        return quantised(self.quantisation, n, s)


@dataclass(frozen=True)
class Turn:
    """A wrong turn.

    Attributes:
        stands: From the spelling, the pattern that is left.
        fits: Whether the spelling has the part that is exchanged.
    """

    stands: Callable[[Spelling], str]
    fits: Callable[[Spelling], bool] = lambda spelling: True


WRONG: dict[str | None, Turn] = {
    **{name: Turn(lambda s: BARE) for name in ROOT_TURNS},
    **{name: Turn(lambda s: BARE, lambda s: s.residual is not None) for name in RESIDUAL_TURNS},
    **{name: Turn(lambda s: BARE) for turns in VALUE_TURNS.values() for name in turns},
    "minus the mean": Turn(lambda s: BARE),
    **{name: Turn(lambda s: s.norm_pattern, lambda s: s.quantisation is not None) for name in QUANTISATION_TURNS},
}
"""Every wrong turn by name."""
