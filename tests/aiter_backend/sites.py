"""AITER's strategies and sites for them, and what they say of a site."""

from dataclasses import replace

import torch

import fusion_aiter.testing  # noqa: F401  # the kit imports it by itself for a backend that it tests
from fusion_aiter import strategies
from fusion_aiter.kernels import KERNELS
from fusion_core import Device
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.samples.sites import resized, with_outputs
from fusion_core.testing import example_site

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
E4M3, E4M3FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
MI300, MI355 = Device("cuda", "gfx942"), Device("cuda", "gfx950")
PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}
STRATEGIES = [each for strategy in strategies.STRATEGIES for each in strategy.expanded()]
KERNEL = {f"aiter.{kernel.name}": kernel for kernel in KERNELS}
PLAIN = [strategy for strategy in STRATEGIES if strategy.option is None]
ASKED = [strategy for strategy in STRATEGIES if strategy.option is not None]


def kernel_of(strategy):
    return KERNEL[strategy.name.removesuffix("_one_stage")]


def site_of(strategy):
    """A site that the strategy can run, on gfx950 where it runs there."""
    if strategy.option is None:
        return example_site(PATTERNS[strategy.pattern], strategy, device=MI355)
    plain = next(each for each in PLAIN if kernel_of(each) is kernel_of(strategy))
    return older(example_site(PATTERNS[strategy.pattern], plain, device=MI355))


def said(strategy, site):
    return [str(reason) for reason in strategy.cannot(site, PATTERNS[strategy.pattern])]


def should_not(strategy, site):
    return [str(reason) for reason in strategy.should_not(site)]


def given(site, **attributes):
    return replace(site, attributes={**site.attributes, **attributes})


def older(site):
    """On gfx942, in its own FP8 format."""
    site = replace(site, device=MI300)
    return given(site, fp8_dtype=E4M3FNUZ) if "fp8_dtype" in site.attributes else site


def typed(site, dtype, *names):
    """The site with some of its tensors, or all, in another dtype."""
    names = names or tuple(site.inputs)
    inputs = {n: replace(meta, dtype=dtype) if n in names else meta for n, meta in site.inputs.items()}
    return with_outputs(PATTERNS[site.pattern], replace(site, inputs=inputs), site.outputs)


def sized(site, *shape):
    return resized(PATTERNS[site.pattern], site, shape)


def live(site, *names):
    return with_outputs(PATTERNS[site.pattern], site, (*site.outputs, *names))


def without(site, name):
    return replace(site, inputs={n: meta for n, meta in site.inputs.items() if n != name})


def hidden(site, width):
    """The site with rows of another width; its definition need not take it."""
    inputs = {n: replace(m, shape=(*m.shape[:-1], width), stride=None) for n, m in site.inputs.items()}
    return replace(site, inputs=inputs)
