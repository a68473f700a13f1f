"""The convolutional stem of CMT (arXiv 2107.06263): three 3x3 convolutions, the first of which may take a stride."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import register_notrace_module
from torch import Tensor, nn

from coterie.layers.batch_norm import as_affine, in_one_pass
from coterie.layers.layout import to_grid, to_map
from coterie.layers.padding import batch_norm, strided, zero_padding
from coterie.ops import gelu_affine


@register_notrace_module  # looks at dtypes, which torch.fx cannot follow
class ConvStem(nn.Module):
    """3 x (3x3 convolution -> GELU -> BN).

    Args:
        in_chans: channels of the image.
        width: channels of each of the three convolutions.
        stride: of the first convolution; 2 in CMT and DGT, 1 for images that are small already.

    Shape: (batch, in_chans, H, W) -> (batch, width, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    def __init__(self, in_chans: int, width: int, *, stride: int = 2, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, width, 3, stride, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, **dd)
        self.norm3 = nn.BatchNorm2d(width, **dd)

    def forward(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch width rows columns"]:
        """Apply the stem. Only the image, the smallest tensor, is copied to channels-last; the rest stays so.

        With a mask (True = a real pixel) padding changes nothing inside, and the output is zero there.
        """
        x = zero_padding(x.contiguous(memory_format=torch.channels_last), mask)
        mask = strided(mask, self.conv1.stride[0])
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2), (self.conv3, self.norm3)):
            x = conv(x)
            if mask is None and in_one_pass(norm, x):
                x = to_map(gelu_affine(to_grid(x), *as_affine(norm)))
            else:
                x = batch_norm(norm, F.gelu(x), mask)
        return x
