"""Position encoding, stem and patch merging: shapes at any size, memory layout, and the equations."""

import pytest
import torch

from coterie.layers import ConditionalPositionEncoding, ConvMerging, ConvStem


def test_position_encoding_is_identity_plus_depthwise_convolution():
    torch.manual_seed(0)
    layer = ConditionalPositionEncoding(4).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    expected = x + layer.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)
    assert layer(x).is_contiguous()


def test_position_encoding_tells_the_border_from_the_middle():
    layer = ConditionalPositionEncoding(1)
    with torch.no_grad():
        layer.conv.weight.fill_(1.0)
        layer.conv.bias.zero_()
    y = layer(torch.ones(1, 5, 5, 1))[0, :, :, 0]
    assert y[0, 0] == 1 + 4
    assert y[0, 2] == 1 + 6
    assert y[2, 2] == 1 + 9


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (7, 10), (1, 1)])
def test_stem_shape_and_layout(stride, size):
    stem = ConvStem(3, 8, stride=stride).eval()
    y = stem(torch.randn(2, 3, *size))
    assert y.shape == (2, 8, -(-size[0] // stride), -(-size[1] // stride))
    assert y.is_contiguous(memory_format=torch.channels_last)
    convolution = 3 * 8 * 9 + 8 + 2 * (8 * 8 * 9 + 8)
    assert sum(p.numel() for p in stem.parameters()) == convolution + 3 * 2 * 8


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 2)])
def test_merging_gives_normalised_contiguous_tokens(size):
    merging = ConvMerging(4, 16)
    y = merging(torch.randn(2, 4, *size).contiguous(memory_format=torch.channels_last))
    assert y.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 16)
    assert y.is_contiguous()
    torch.testing.assert_close(y.mean(-1), torch.zeros_like(y.mean(-1)), atol=1e-5, rtol=0)
