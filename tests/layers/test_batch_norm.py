"""Folding a batch normalisation that stands still."""

import pytest
import torch
from torch import nn

from coterie.layers.batch_norm import as_affine, fold_around, stands_still


def _norm(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(dim).double().eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(dim, generator=generator))
        norm.running_var.copy_(torch.rand(dim, generator=generator) + 0.1)
    return norm


def test_affine_form():
    norm = _norm(5, 0)
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    scale, shift = as_affine(norm)
    torch.testing.assert_close(norm(x), x * scale[:, None, None] + shift[:, None, None], rtol=1e-12, atol=1e-12)


def test_folded_layer_equals_the_three_with_every_gradient():
    before, linear, after = _norm(5, 1), nn.Linear(5, 4).double(), _norm(4, 2)
    x = torch.randn(6, 5, dtype=torch.float64)
    parameters = [*before.parameters(), *linear.parameters(), *after.parameters()]
    got = nn.functional.linear(x, *fold_around(before, linear, after))
    expected = after(linear(before(x[:, :, None, None])[:, :, 0, 0])[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(got, parameters, cotangent)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, parameters, cotangent)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11)


def test_folding_keeps_the_dtype_of_the_layer():
    before, linear, after = _norm(5, 1).bfloat16(), nn.Linear(5, 4).bfloat16(), _norm(4, 2).bfloat16()
    weight, bias = fold_around(before, linear, after)
    assert weight.dtype == bias.dtype == torch.bfloat16


def test_only_running_statistics_stand_still():
    norm = nn.BatchNorm2d(3)
    assert not stands_still(norm)
    assert stands_still(norm.eval())
    assert not stands_still(norm, nn.BatchNorm2d(3))
    without = nn.BatchNorm2d(3, track_running_stats=False).eval()
    assert not stands_still(without)
    with pytest.raises(ValueError, match="without running statistics"):
        as_affine(without)
