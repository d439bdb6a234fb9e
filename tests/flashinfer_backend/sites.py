"""FlashInfer's strategies and sites for them, and what they say of a site."""

from dataclasses import replace

import torch

from fusion_core import Device
from fusion_core.patterns import CORE_PATTERNS
from fusion_core.samples.sites import resized, with_outputs
from fusion_core.testing import example_site
from fusion_flashinfer import strategies
from fusion_flashinfer.kernels import KERNELS

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
H100, B200 = Device("cuda", "sm_90"), Device("cuda", "sm_100")
PATTERNS = {pattern.name: pattern for pattern in CORE_PATTERNS}


def expanded(declared):
    return [each for strategy in declared for each in strategy.expanded()]


STRATEGIES = expanded(strategies.STRATEGIES)
KERNEL = {f"flashinfer.{kernel.name}": kernel for kernel in KERNELS}
PLAIN = [strategy for strategy in STRATEGIES if strategy.option is None]


def kernel_of(strategy):
    return KERNEL[strategy.name.removesuffix("_pdl").removesuffix("_mnnvl").removesuffix("_two_shot")]


def is_two_shot(strategy):
    return "_two_shot" in strategy.name


def site_of(strategy, device=None):
    device = device or (B200 if kernel_of(strategy).quantization == "nvfp4" else H100)
    return example_site(PATTERNS[strategy.pattern], strategy, device=device)


def said(strategy, site):
    return [str(reason) for reason in strategy.cannot(site, PATTERNS[strategy.pattern])]


def typed(site, dtype, *names):
    """The site with some tensors, or all but scales, in another dtype."""
    names = names or tuple(name for name in site.inputs if name not in ("scale", "global_scale"))
    inputs = {n: replace(meta, dtype=dtype) if n in names else meta for n, meta in site.inputs.items()}
    return with_outputs(PATTERNS[site.pattern], replace(site, inputs=inputs), site.outputs)


def untouched(site, name):
    """The site with one tensor in bfloat16; its definition would not take it."""
    return replace(site, inputs={**site.inputs, name: replace(site.inputs[name], dtype=BF16)})


def sized(site, *shape):
    return resized(PATTERNS[site.pattern], site, shape)


def given(site, **attributes):
    site = replace(site, attributes={**site.attributes, **attributes})
    return with_outputs(PATTERNS[site.pattern], site, site.outputs)


def live(site, *names):
    return with_outputs(PATTERNS[site.pattern], site, names)


def many_registers(strategy):
    """With 1024 threads to a block this kernel is not launched: "too many resources requested for launch"."""
    return strategy.name.endswith("_group_fp8_out_two_shot")
