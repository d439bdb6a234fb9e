"""What a site computes, and the tensors of one pattern at one size."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from ranks import device

from fusion_core.vocabulary import fp8

EPS = 1e-5
GROUP_SIZE = 128


@dataclass(frozen=True)
class Pattern:
    """What a site computes, by the operator's name."""

    name: str

    @property
    def adds(self):
        return "_add_" in self.name

    @property
    def norms(self):
        return self.name != "all_reduce"

    @property
    def norm_out(self):
        return self.name.endswith("_out")

    @property
    def quantization(self):
        stem = self.name.removesuffix("_out")
        return next((q for q in ("static_fp8", "token_fp8", "group_fp8") if stem.endswith(q)), "")

    @property
    def code(self):
        """FlashInfer's ``AllReduceFusionPattern``."""
        if not self.norms:
            return 0
        plain, out = {"": (1, 1), "static_fp8": (2, 4), "group_fp8": (8, 9), "token_fp8": (10, 11)}[self.quantization]
        return out if self.norm_out else plain


class Point:
    """The tensors of one pattern at one size."""

    def __init__(self, pattern, hidden, tokens):
        self.pattern, self.hidden, self.tokens = pattern, hidden, tokens
        own = torch.Generator(device()).manual_seed(1 + dist.get_rank())
        common = torch.Generator(device()).manual_seed(0)
        shape = (tokens, hidden)

        def normal(generator, *shape):
            return torch.randn(shape, generator=generator, device=device()).to(torch.bfloat16)

        self.source = normal(own, *shape)
        self.x = torch.empty_like(self.source)
        self.residual = normal(common, *shape)
        self.weight = normal(common, hidden)
        self.scale = torch.full((1,), 0.02, device=device())

    def produce(self):
        torch.mul(self.source, 1.0, out=self.x)


def tail(pattern):
    """What stands behind the all_reduce, as Hugging Face's Llama writes it: to results and the next residual."""

    def rms_norm(x, weight):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return weight * wide.to(x.dtype)

    def run(reduced, residual, weight, scale):
        total = residual + reduced if pattern.adds else reduced
        normed = rms_norm(total, weight)
        if not pattern.quantization:
            return (normed,), total
        if pattern.quantization == "static_fp8":
            results = (fp8.quantize_static_fp8(normed, scale),)
        elif pattern.quantization == "token_fp8":
            results = fp8.quantize_token_fp8(normed)
        else:
            results = fp8.quantize_group_fp8(normed, group_size=GROUP_SIZE, scale_format="ue8m0_packed")
        return (*results, normed) if pattern.norm_out else tuple(results), total

    return run
