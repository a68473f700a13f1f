"""The two views of one piece of memory: token grids and channels-last feature maps. Neither function copies."""

from jaxtyping import Float
from torch import Tensor


def to_map(x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch dim height width"]:
    """A contiguous token grid seen as a channels-last feature map, as convolutions take it."""
    return x.permute(0, 3, 1, 2)


def to_grid(x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch height width dim"]:
    """A channels-last feature map seen as a contiguous token grid, as attention and linear layers take it."""
    return x.permute(0, 2, 3, 1)
