"""Epsilons that Dynamo makes inputs of a graph: they stay numbers, as kernels take them, and other floats stay inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

import fusion_core
from fusion_core._torch.inductor import post_grad_only
from tests.test_matching import ADD

pytestmark = pytest.mark.usefixtures("one_rank")

N = 64


def total(x: Tensor, r: Tensor) -> Tensor:
    y = x.clone()
    dist.all_reduce(y)
    return y + r


def by_mean(x: Tensor, r: Tensor, w: Tensor, eps: float, scale: float) -> Any:
    h = total(x * scale, r)
    wide = h.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(h.dtype), h


def by_mean_without_its_dimension(x: Tensor, r: Tensor, w: Tensor, eps: float, scale: float) -> Any:
    h = total(x * scale, r)
    wide = h.float()
    root = torch.rsqrt(eps + (wide * wide).mean(-1).unsqueeze(-1))
    return w * (wide * root).to(h.dtype), h


def by_function(x: Tensor, r: Tensor, w: Tensor, eps: float, scale: float) -> Any:
    h = total(x * scale, r)
    return torch.nn.functional.rms_norm(h, (N,), w, eps), h


def given(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x, r = (torch.randn(tokens, N, generator=generator).bfloat16() for _ in range(2))
    return x, r, torch.nn.Parameter(torch.rand(N, generator=generator).bfloat16())


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _a_new_start() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("model", [by_mean, by_mean_without_its_dimension, by_function])
def test_an_epsilon_is_a_number_of_the_graph_and_a_scale_is_not(model: Any) -> None:
    """A new epsilon is a new graph, with the right result; a new scale is none."""
    eps: list[float] = []

    def look(graph: torch.fx.Graph) -> None:
        (site,) = fusion_core.FusionPass(fusion_core.FusionConfig(order=("reference",))).run(graph).sites
        assert site.strategy == f"reference.{ADD}"
        eps.append(site.attributes["eps"])

    compiled = torch.compile(model, backend=post_grad_only(look), dynamic=True, fullgraph=True)
    with torch.no_grad():
        for number, (epsilon, scale) in enumerate([(1e-5, 2.0), (1e-5, 3.0), (0.5, 3.0), (0.5, 4.0)]):
            x, r, w = given(5 + number)
            for found, exact in zip(compiled(x, r, w, epsilon, scale), model(x, r, w, epsilon, scale), strict=True):
                torch.testing.assert_close(found, exact)
    assert eps == pytest.approx([1e-5, 0.5])
    assert graphs() == 2


def test_all_of_inductor_and_explain_say_the_same() -> None:
    x, r, w = given()
    with torch.no_grad():
        (explained,) = fusion_core.explain(by_mean, x, r, w, 1e-5, 2.0, dynamic=True).sites
        results = torch.compile(by_mean, backend="fusion_core", dynamic=True, fullgraph=True)(x, r, w, 1e-5, 2.0)
        exact = by_mean(x, r, w, 1e-5, 2.0)
    report = fusion_core.last_report()
    assert report is not None
    (site,) = report.sites
    assert site.strategy == explained.strategy == f"reference.{ADD}"
    assert site.attributes["eps"] == explained.attributes["eps"] == 1e-5
    for found, each in zip(results, exact, strict=True):
        torch.testing.assert_close(found, each)


def test_an_epsilon_that_differs_between_two_calls_stays_a_number() -> None:
    """Dynamo makes a float that has changed an input by itself."""
    compiled = torch.compile(by_mean, backend="fusion_core", fullgraph=True)
    x, r, w = given()
    with torch.no_grad():
        for epsilon in (1e-5, 0.25, 0.5):
            found, _ = compiled(x, r, w, epsilon, 1.0)
            torch.testing.assert_close(found, by_mean(x, r, w, epsilon, 1.0)[0])
            report = fusion_core.last_report()
            assert report is not None
            assert [site.attributes["eps"] for site in report.sites] == [epsilon]


def shifted(x: Tensor, r: Tensor, shift: float) -> Tensor:
    return total(x, r) + shift


def shifted_mean(x: Tensor, r: Tensor, shift: float) -> Tensor:
    return total(x, r).mean(-1, keepdim=True) + shift


def normalised(x: Tensor, r: Tensor, shift: float) -> Tensor:
    return torch.sqrt(total(x, r).float().square()) + shift


@pytest.mark.parametrize("model", [shifted, shifted_mean, normalised])
def test_a_float_that_is_no_epsilon_stays_an_input(model: Any) -> None:
    """A term of a loss changes with each call: as a number it would compile a graph for each."""
    compiled = torch.compile(model, backend=post_grad_only(lambda graph: None), dynamic=True, fullgraph=True)
    x, r, _ = given()
    with torch.no_grad():
        for shift in (1.0, 2.0, 3.0):
            torch.testing.assert_close(compiled(x, r, shift), model(x, r, shift))
    assert graphs() == 1
