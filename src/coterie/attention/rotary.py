"""Rotary positions (RoFormer, arXiv 2104.09864) in the half-split pairing of GPT-NeoX and Llama.

Channel i of the first half and channel i of the second half of the rotated channels form a pair, which is turned by
position · base^(-2i/channels). With fewer rotated channels than a head has, the rest passes through (partial rotary).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_tables(
    positions: Float[Tensor, "*batch tokens"], channels: int, base: float
) -> tuple[Float[Tensor, "*batch tokens channels"], Float[Tensor, "*batch tokens channels"]]:
    """Cosines and sines for `rotate`, in float32, or float64 if the positions are."""
    dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
    steps = torch.arange(0, channels, 2, device=positions.device, dtype=dtype) / channels
    angles = positions.to(dtype).unsqueeze(-1) * base**-steps
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    cos: Float[Tensor, "#batch #heads tokens channels"],
    sin: Float[Tensor, "#batch #heads tokens channels"],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Queries or keys turned to their positions; channels beyond those of the tables pass through."""
    channels = cos.shape[-1]
    turned, rest = x[..., :channels], x[..., channels:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
