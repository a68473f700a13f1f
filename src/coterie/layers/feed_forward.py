"""The inverted residual feed-forward (IRFFN) of CMT: a feed-forward network that also looks at each token's neighbours.

Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", arXiv 2107.06263, as in the authors' code:

    x -> Linear -> GELU -> BN -> (identity + 3x3 depthwise convolution) -> GELU -> BN -> Linear -> BN
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import register_notrace_module
from torch import Tensor, nn

from coterie.layers.batch_norm import as_affine, fold_around, in_one_pass, stands_still
from coterie.layers.depthwise import residual_depthwise
from coterie.layers.layout import to_grid, to_map
from coterie.layers.padding import batch_norm
from coterie.ops import gelu_depthwise


@register_notrace_module  # looks at dtypes, which torch.fx cannot follow
class InvertedResidualFeedForward(nn.Module):
    """Expand, mix with the neighbours, project back. Linear layers are the paper's 1x1 convolutions.

    Args:
        dim: channels of the tokens.
        hidden_dim: channels between the two linear layers (4 x dim in CMT and DGT).

    Shape: (batch, height, width, dim) -> the same.
    """

    def __init__(self, dim: int, hidden_dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.expand = nn.Linear(dim, hidden_dim, **dd)
        self.norm1 = nn.BatchNorm2d(hidden_dim, **dd)
        self.depthwise = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.norm2 = nn.BatchNorm2d(hidden_dim, **dd)
        self.project = nn.Linear(hidden_dim, dim, **dd)
        self.norm3 = nn.BatchNorm2d(dim, **dd)

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Apply the feed-forward network (without the block's own residual).

        With a mask (True = a real token) padding changes nothing inside: the depthwise convolution reads zeros there,
        and the statistics of the batch normalisations leave it out.
        """
        if mask is None and in_one_pass(self.norm1, x):
            conv = self.depthwise
            assert conv.bias is not None
            x, offset = F.linear(x, self.expand.weight), self.expand.bias
            x = to_map(gelu_depthwise(x, *as_affine(self.norm1), conv.weight, conv.bias, offset=offset))
        else:
            x = batch_norm(self.norm1, to_map(F.gelu(self.expand(x))), mask)
            x = F.gelu(residual_depthwise(x, self.depthwise.weight, self.depthwise.bias))
        if stands_still(self.norm2, self.norm3):
            return F.linear(to_grid(x), *fold_around(self.norm2, self.project, self.norm3))
        x = self.project(to_grid(batch_norm(self.norm2, x, mask)))
        return to_grid(batch_norm(self.norm3, to_map(x), mask))
