"""Keeping the padding of a batch of images of different sizes out of convolutions and normalisations.

A mask (batch, height, width) is True at real positions. A zero-padded convolution reads zeros beyond the border of an
image; so if padding is set to zero in front of each one, it gives inside the image exactly what it would give without
the padding. Stride s keeps the positions 0, s, 2s, ..., and so does its mask: an image of n rows has ceil(n / s) then.
"""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from coterie.layers.batch_norm import stands_still
from coterie.layers.layout import to_grid, to_map

Mask = Bool[Tensor, "batch height width"]


def zero_padding(
    x: Float[Tensor, "batch dim height width"], mask: Mask | None
) -> Float[Tensor, "batch dim height width"]:
    """`x` with zeros at padding; `x` itself without a mask."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(1), 0.0)


def strided(mask: Mask | None, stride: int) -> Bool[Tensor, "batch rows columns"] | None:
    """The mask after a convolution with a stride and 'same' padding."""
    return mask if mask is None or stride == 1 else mask[:, ::stride, ::stride]


def batch_norm(
    norm: _BatchNorm, x: Float[Tensor, "batch dim height width"], mask: Mask | None
) -> Float[Tensor, "batch dim height width"]:
    """`norm(x)`; with a mask its statistics are those of the real positions, and padding is zero afterwards."""
    if mask is None:
        return norm(x)
    if stands_still(norm):
        return zero_padding(norm(x), mask)
    tokens = to_grid(x)
    real = norm(tokens[mask][:, :, None, None])[:, :, 0, 0]  # as so many images of one pixel
    return to_map(tokens.new_zeros(tokens.shape, dtype=real.dtype).masked_scatter(mask.unsqueeze(-1), real))
