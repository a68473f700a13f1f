"""Conditional position encoding: a depthwise convolution whose zero padding tells each token where it is.

Chu et al., "Conditional Positional Encodings for Vision Transformers", arXiv 2102.10882; in each block as in CMT, arXiv
2107.06263. It fits any input size, since nothing in it belongs to a position.
"""

from jaxtyping import Bool, Float
from timm.layers import register_notrace_module
from torch import Tensor, nn

from coterie.layers.depthwise import residual_depthwise
from coterie.layers.layout import to_grid, to_map
from coterie.layers.padding import zero_padding


@register_notrace_module  # looks at the dtype of its input, which torch.fx cannot follow
class ConditionalPositionEncoding(nn.Module):
    """x + 3x3 depthwise convolution of x, on a token grid.

    Shape: (batch, height, width, dim) -> the same.
    """

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Add the encoding. With a mask (True = a real token) padding is taken for zeros, as it is beyond the grid."""
        return to_grid(residual_depthwise(zero_padding(to_map(x), mask), self.conv.weight, self.conv.bias))
