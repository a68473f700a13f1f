"""The definition, in plain torch."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gelu_affine(
    x: Float[Tensor, "... dim"], scale: Float[Tensor, " dim"], shift: Float[Tensor, " dim"]
) -> Float[Tensor, "... dim"]:
    """GELU(x) scale + shift."""
    return F.gelu(x) * scale + shift


def gelu_depthwise(
    x: Float[Tensor, "batch height width dim"],
    offset: Float[Tensor, " dim"],
    scale: Float[Tensor, " dim"],
    shift: Float[Tensor, " dim"],
    weight: Float[Tensor, "dim 1 3 3"],
    bias: Float[Tensor, " dim"],
) -> Float[Tensor, "batch height width dim"]:
    """u = GELU(x + offset) scale + shift; GELU(u + conv(u) + bias), with zeros around u."""
    u = gelu_affine(x + offset, scale, shift).permute(0, 3, 1, 2)
    u = u + F.conv2d(u, weight, bias, padding=1, groups=weight.shape[0])
    return F.gelu(u).permute(0, 2, 3, 1)
