"""Backends for these tests, as entry points that no distribution has to install."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import torch

from fusion_core import FusionConfig, FusionPass, Registry, Strategy, hookimpl
from fusion_core.patterns.plain import all_reduce_add_rms_norm, all_reduce_rms_norm
from fusion_core.reason import Reason
from fusion_core.site import Site


@torch.library.custom_op("fusion_core_model_tests::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, group: str) -> tuple[torch.Tensor, torch.Tensor]:
    return all_reduce_rms_norm.function(x, weight, eps, group=group)


@torch.library.custom_op("fusion_core_model_tests::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, residual_out, _ = all_reduce_add_rms_norm.function(x, residual, weight, eps, group=group)
    return normed, residual_out


@_rms_norm.register_fake
@_add_rms_norm.register_fake
def _shapes(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


class Never:
    """A requirement that no site meets."""

    def unmet(self, site: Site) -> Reason:
        return Reason("never", f"{site.pattern} is asked for", "to be left alone")

    def __repr__(self) -> str:
        return "Never()"


def _opaque() -> Iterator[Strategy]:
    """Operators that a compiler cannot look into, as those of kernel libraries."""
    yield Strategy("all_reduce_rms_norm", "opaque.first", _rms_norm)
    yield Strategy("all_reduce_add_rms_norm", "opaque.rest", _add_rms_norm, outputs=("normed", "residual_out"))


def _refusing() -> Iterator[Strategy]:
    for pattern, operator in (("all_reduce_rms_norm", _rms_norm), ("all_reduce_add_rms_norm", _add_rms_norm)):
        outputs = ("normed", "residual_out") if pattern == "all_reduce_add_rms_norm" else None
        yield Strategy(pattern, f"refusing.{pattern}", operator, requires=(Never(),), outputs=outputs)  # type: ignore[arg-type]


opaque = SimpleNamespace(fusion_strategies=hookimpl(_opaque))
refusing = SimpleNamespace(fusion_strategies=hookimpl(_refusing))


def pass_with(name: str) -> FusionPass:
    """A pass with one of this module's backends and no other."""
    point = EntryPoint(name, f"{__name__}:{name}", "fusion_core.backends")
    return FusionPass(registry=Registry.of([point], FusionConfig(order=(name,))))
