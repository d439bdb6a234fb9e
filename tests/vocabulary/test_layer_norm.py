"""LayerNorm and the bias: the words against torch's own functions, and the patterns against float64."""

import pytest
import torch
import torch.nn.functional as F

from fusion_core.vocabulary import add_bias, layer_norm
from tests.support.oracle import check_examples

X = torch.linspace(-3, 5, 4 * 12, dtype=torch.float64).reshape(4, 12).cos() * 7 + 2
WEIGHT, BIAS = torch.linspace(0.5, 1.5, 12, dtype=torch.float64), torch.linspace(-1, 1, 12, dtype=torch.float64)


@pytest.mark.parametrize("weight", [WEIGHT, None], ids=["weight", "no weight"])
@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "no bias"])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_it_is_torchs_in_float64(weight, bias, eps):
    torch.testing.assert_close(layer_norm(X, weight, bias, eps), F.layer_norm(X, (12,), weight, bias, eps))


def test_the_weights_constant_is_nemotrons():
    expected = F.layer_norm(X, (12,), WEIGHT + 1, BIAS, 1e-5)
    torch.testing.assert_close(layer_norm(X, WEIGHT, BIAS, 1e-5, weight_bias=1.0), expected)
    torch.testing.assert_close(layer_norm(X, None, BIAS, 1e-5, weight_bias=1.0), F.layer_norm(X, (12,), bias=BIAS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_rounded_once(dtype):
    x, weight, bias = X.to(dtype), WEIGHT.to(dtype), BIAS.float()
    exact = layer_norm(x.double(), weight.double(), bias.double(), 1e-5)
    found = layer_norm(x, weight, bias, 1e-5)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps / 2 * 1.001
    assert layer_norm(x, weight, bias, 1e-5, dtype=torch.float32).dtype == torch.float32


def test_a_bias_is_added_in_the_wider_dtype_or_the_one_that_is_asked_for():
    x, bias = X.bfloat16(), BIAS.float()
    assert torch.equal(add_bias(x, bias), x.float() + bias)
    assert torch.equal(add_bias(x, bias, dtype=torch.bfloat16), x + bias.bfloat16())


@pytest.mark.parametrize("name", ["all_reduce_layer_norm", "all_reduce_add_layer_norm", "all_reduce_bias"])
def test_examples_against_float64(name):
    check_examples(name)
