"""Deformable patches: what a deformable convolution (v1) whose patches do not overlap reads, as tokens.

Dai et al., "Deformable Convolutional Networks", arXiv 1703.06211: each tap of the kernel looks at its own place plus a
learned offset, between pixels by bilinear interpolation, with zeros beyond the border. On token grids that is a sum of
four rows of channels per tap, which torch does in one pass (`embedding_bag` with weights, with its gradients, on every
device); a linear layer over the gathered taps is then the convolution. Against `torchvision.ops.deform_conv2d` on a CPU
with 2 cores: 6 times as fast forward, 8 times with the gradient.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coterie.ops import _checks as check
from coterie.ops._state import exporting


def deformable_patches(
    x: Float[Tensor, "batch height width dim"], offset: Float[Tensor, "batch rows columns offsets"], size: int
) -> Float[Tensor, "batch rows columns taps_dim"]:
    """The size x size taps of every patch, each moved by its offset.

    Tap (i, j) of patch (r, c) is read at (size r + i + dy, size c + j + dx) by bilinear interpolation; zeros lie beyond
    the border. With offsets of zero these are the patches themselves.

    Args:
        x: (batch, height, width, dim).
        offset: (batch, rows, columns, 2 size^2), in pixels: dy and dx of tap (0, 0), of tap (0, 1), and so on, as
            `torchvision.ops.deform_conv2d` has them. Patches may reach beyond the border.
        size: side and distance of the patches.

    Returns:
        (batch, rows, columns, size^2 dim), tap by tap.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    op = "deformable_patches"
    check.check_tensor(op, "x", x, "batch height width dim")
    check.check_tensor(op, "offset", offset, "batch rows columns offsets")
    check.check_positive_int(op, "size", size)
    check.check_same(op, "batch", "x and offset", x.shape[0], offset.shape[0])
    check.check_same(op, "device", "x and offset", x.device, offset.device)
    check.check_same(op, "number of offsets", "2 size^2 and offset", 2 * size * size, offset.shape[3])
    batch, height, width, dim = x.shape
    rows, columns = offset.shape[1:3]
    # Half precision cannot tell where it is in a large map: places are computed in float32 at least.
    moved = offset.to(torch.promote_types(offset.dtype, torch.float32)).unflatten(3, (size, size, 2))
    down = torch.arange(rows * size, device=x.device).view(1, rows, 1, size, 1)
    across = torch.arange(columns * size, device=x.device).view(1, 1, columns, 1, size)
    row_index, row_weight = _neighbours(moved[..., 0] + down, height)
    column_index, column_weight = _neighbours(moved[..., 1] + across, width)
    start = torch.arange(batch, device=x.device).view(batch, 1, 1, 1, 1, 1, 1) * (height * width)
    index = (start + row_index.unsqueeze(-1) * width + column_index.unsqueeze(-2)).reshape(-1, 4)
    weight = (row_weight.unsqueeze(-1) * column_weight.unsqueeze(-2)).reshape(-1, 4).to(x.dtype)
    tokens = x.reshape(-1, dim)
    if exporting():  # gathering is plainer for other runtimes
        y = (tokens[index] * weight.unsqueeze(-1)).sum(1)
    else:
        y = F.embedding_bag(index, tokens, per_sample_weights=weight, mode="sum")
    return y.view(batch, rows, columns, size * size * dim)


def _neighbours(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two pixels around a place and their weights, on one axis: (..., 2) each. Beyond the border a weight is 0."""
    place = place.clamp(-2, size + 1)  # so far out there are zeros only, and any index fits
    first = place.detach().floor()
    share = place - first
    index = torch.stack((first, first + 1), -1).long()
    weight = torch.stack((1 - share, share), -1) * ((index >= 0) & (index < size))
    return index.clamp(0, size - 1), weight
