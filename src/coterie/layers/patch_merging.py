"""Overlapping patch merging, before each stage of a pyramid (CSWin, DGT): a strided 3x3 convolution and a LayerNorm."""

from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.layers.layout import to_grid
from coterie.layers.padding import zero_padding


class ConvMerging(nn.Module):
    """3x3 convolution with a stride, then LayerNorm over channels.

    Shape: (batch, in_dim, H, W) -> token grid (batch, ceil(H / stride), ceil(W / stride), out_dim).
    """

    def __init__(self, in_dim: int, out_dim: int, *, stride: int = 2, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 3, stride, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, eps=1e-6, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns out_dim"]:
        """Merge patches into tokens. With a mask (True = real) padding is taken for zeros, as it is beyond the map."""
        return self.norm(to_grid(self.conv(zero_padding(x, mask))))
