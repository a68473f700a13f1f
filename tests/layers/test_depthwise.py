"""x + depthwise convolution in one pass."""

import pytest
import torch
import torch.nn.functional as F

from coterie.layers.depthwise import residual_depthwise


def _plain(x, weight, bias):
    return x + F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _inputs(dtype, size=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 7, generator=generator, dtype=torch.float64)
    weight = 0.1 * torch.randn(6, 1, size, size, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (x, weight, bias)]


@pytest.mark.parametrize("size", [1, 3, 5])
def test_equals_the_sum_in_float64_with_every_gradient(size):
    inputs = [t.requires_grad_() for t in _inputs(torch.float64, size)]
    got, expected = residual_depthwise(*inputs), _plain(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(got, inputs, cotangent)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, inputs, cotangent)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_half_precision_does_not_lose_small_weights():
    x, weight, bias = _inputs(torch.bfloat16)
    weight, bias = weight * 1e-2, bias * 0  # 1 + weight would be 1 in bfloat16, and the output x itself
    got = residual_depthwise(x, weight, bias)
    assert torch.equal(got, _plain(x, weight, bias))
    assert not torch.equal(got, x)


def test_autocast_takes_the_sum():
    x, weight, bias = _inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = residual_depthwise(x, weight * 1e-2, bias)
        assert torch.equal(got, _plain(x, weight * 1e-2, bias))
    assert got.dtype == torch.float32
