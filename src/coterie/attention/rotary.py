"""Rotary positions (RoFormer, arXiv 2104.09864) in the half-split pairing of GPT-NeoX and Llama.

Channel i of the first half and channel i of the second half of the rotated channels form a pair, which is turned by
position · base^(-2i/channels). With fewer rotated channels than a head has, the rest passes through (partial rotary).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_frequencies(
    channels: int, base: float, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " half"]:
    """Radians per position of each pair of channels."""
    return 1.0 / (base ** (torch.arange(0, channels, 2, device=device, dtype=dtype) / channels))


def rotary_tables(
    positions: Int[Tensor, "*batch tokens"], frequencies: Float[Tensor, " half"]
) -> tuple[Float[Tensor, "*batch tokens channels"], Float[Tensor, "*batch tokens channels"]]:
    """Cosines and sines for `rotate`, in the dtype of the frequencies."""
    angles = positions.unsqueeze(-1).to(frequencies.dtype) * frequencies
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
    half = channels // 2
    signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # (first, second) meets (-second, first)
    turned = torch.addcmul(turned * cos, turned.roll(half, dims=-1), signed)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
