"""x + depthwise convolution of x, in one pass: the identity is one more 1 at the kernel's centre."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from coterie.ops._state import autocasting


def residual_depthwise(
    x: Float[Tensor, "batch dim height width"],
    weight: Float[Tensor, "dim 1 size size"],
    bias: Float[Tensor, " dim"] | None,
) -> Float[Tensor, "batch dim height width"]:
    """x + conv2d(x, weight, bias) with one group per channel, 'same' padding and an odd kernel size.

    In float32 and float64 the residual is folded into the kernel, which saves a pass over memory. In half precision
    1 + weight would lose the weight's low bits, so there the sum is written out.
    """
    channels, _, size, _ = weight.shape
    half = size // 2
    if x.dtype not in (torch.float32, torch.float64) or autocasting(x.device.type):
        return x + F.conv2d(x, weight, bias, padding=half, groups=channels)
    identity = F.pad(weight.new_ones(1, 1, 1, 1), (half, half, half, half))
    return F.conv2d(x, weight + identity, bias, padding=half, groups=channels)
