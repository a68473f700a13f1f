"""The inverted residual feed-forward against its own equation, written out."""

import pytest
import torch
import torch.nn.functional as F

from coterie.layers import InvertedResidualFeedForward


def _layer(seed=0, dim=6, hidden=12):
    torch.manual_seed(seed)
    layer = InvertedResidualFeedForward(dim, hidden).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        for norm in (layer.norm1, layer.norm2, layer.norm3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 2)
    return layer


def _written_out(layer, x):
    """CMT: conv1x1 -> GELU -> BN -> (identity + depthwise) -> GELU -> BN -> conv1x1 -> BN, on a channels-first map."""
    x = x.permute(0, 3, 1, 2)
    x = layer.norm1(F.gelu(F.conv2d(x, layer.expand.weight[:, :, None, None], layer.expand.bias)))
    x = layer.norm2(F.gelu(x + layer.depthwise(x)))
    x = layer.norm3(F.conv2d(x, layer.project.weight[:, :, None, None], layer.project.bias))
    return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grid", [(5, 4), (1, 1), (1, 9)])
def test_equals_the_equation_with_every_gradient(training, grid):
    ours, theirs = _layer().train(training), _layer().train(training)
    x = torch.randn(3, *grid, 6, dtype=torch.float64)
    got, expected = ours(x), _written_out(theirs, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(expected)
    got.backward(cotangent)
    expected.backward(cotangent)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        scale = other.grad.abs().max().item() + 1e-6
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-10 * scale + 1e-10, msg=name)
    for mine, other in zip(ours.buffers(), theirs.buffers()):  # running statistics
        torch.testing.assert_close(mine, other)


def test_evaluation_sees_changes_of_weights_at_once():
    layer = _layer().eval()
    x = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    layer(x)
    layer.norm2.running_mean.data.add_(1.0)  # .data leaves no trace that a cache could go by
    layer.project.weight.data.mul_(2.0)
    torch.testing.assert_close(layer(x), _written_out(layer, x), rtol=1e-10, atol=1e-10)


def test_a_norm_set_to_train_inside_an_evaluated_layer_is_not_folded():
    layer = _layer().eval()
    layer.norm2.train()
    before = layer.norm2.running_mean.clone()
    layer(torch.randn(2, 4, 4, 6, dtype=torch.float64))
    assert not torch.equal(layer.norm2.running_mean, before)


def test_parameters_and_memory_layout():
    layer = InvertedResidualFeedForward(8, 32)
    expected = (8 * 32 + 32) + 2 * 32 + (9 * 32 + 32) + 2 * 32 + (32 * 8 + 8) + 2 * 8
    assert sum(p.numel() for p in layer.parameters()) == expected
    for mode in (True, False):
        assert layer.train(mode)(torch.randn(2, 4, 4, 8)).is_contiguous()
