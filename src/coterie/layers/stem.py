"""The convolutional stem of CMT (arXiv 2107.06263): three 3x3 convolutions, the first of which may take a stride."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ConvStem(nn.Sequential):
    """3 x (3x3 convolution -> GELU -> BN).

    Args:
        in_chans: channels of the image.
        width: channels of each of the three convolutions.
        stride: of the first convolution; 2 in CMT and DGT, 1 for images that are small already.

    Shape: (batch, in_chans, H, W) -> (batch, width, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    def __init__(self, in_chans: int, width: int, *, stride: int = 2, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for index in range(3):
            layers += [
                nn.Conv2d(width if index else in_chans, width, 3, 1 if index else stride, padding=1, **dd),
                nn.GELU(),
                nn.BatchNorm2d(width, **dd),
            ]
        super().__init__(*layers)

    def forward(self, x: Float[Tensor, "batch in_chans height width"]) -> Float[Tensor, "batch width rows columns"]:
        """Apply the stem. Only the image, the smallest tensor, is copied to channels-last; the rest stays so."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))
