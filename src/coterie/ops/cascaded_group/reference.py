"""The definition, in plain torch."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def cascaded_group_attention(
    x: Float[Tensor, "batch rows columns dim"],
    weight: Float[Tensor, "heads qkv_dim head_dim"],
    bias: Float[Tensor, "heads qkv_dim"],
    taps: Float[Tensor, "heads key_dim size size"],
    tap_bias: Float[Tensor, "heads key_dim"],
    table: Float[Tensor, "heads offsets"],
    mask: Bool[Tensor, "batch rows columns"] | None,
    window: tuple[int, int],
    outside: bool,
    scale: float,
) -> Float[Tensor, "batch rows columns dim"]:
    """All heads, window by window, in the order of the grid."""
    batch, rows, columns, dim = x.shape
    heads, key_dim, size = taps.shape[:3]
    high, wide = window
    spare = (0, -columns % wide, 0, -rows % high)
    real = x.new_ones(batch, rows, columns, dtype=torch.bool) if mask is None else mask
    real = F.pad(real, spare, value=outside)
    counts = (real.shape[1] // high, real.shape[2] // wide)

    def cut(t: Tensor) -> Tensor:
        parts = t.unflatten(2, (counts[1], wide)).unflatten(1, (counts[0], high)).transpose(2, 3)
        return parts.reshape(-1, high * wide, t.shape[-1])

    parts, real = cut(F.pad(x, (0, 0, *spare))).chunk(heads, -1), cut(real.unsqueeze(-1)).squeeze(-1)
    offsets = bias_of_pairs(table, window)
    outputs: list[Tensor] = []
    for head in range(heads):
        f = parts[head] + outputs[-1] if outputs else parts[head]
        query, key, value = F.linear(f, weight[head], bias[head]).split([key_dim, key_dim, dim // heads], -1)
        image = query.masked_fill(~real.unsqueeze(-1), 0.0).transpose(1, 2).unflatten(2, window)
        query = F.conv2d(image, taps[head].unsqueeze(1), tap_bias[head], padding=size // 2, groups=key_dim).flatten(2)
        logits = scale * query.transpose(1, 2) @ key.transpose(1, 2) + offsets[head]
        nobody = ~real.any(-1)[:, None, None]
        weights = logits.masked_fill(~real.unsqueeze(1) & ~nobody, float("-inf")).softmax(-1)
        outputs.append(weights.masked_fill(nobody, 0.0) @ value)
    y = torch.cat(outputs, -1).unflatten(1, window).unflatten(0, (batch, *counts)).transpose(2, 3)
    return y.flatten(3, 4).flatten(1, 2)[:, :rows, :columns].contiguous()


def bias_of_pairs(
    table: Float[Tensor, "heads offsets"], window: tuple[int, int]
) -> Float[Tensor, "heads window_tokens window_tokens"]:
    """The bias of every pair of tokens of a window, by their absolute offset |rows|, |columns| in a square table."""
    side = round(table.shape[1] ** 0.5)
    row, column = (torch.arange(n, device=table.device) for n in window)
    down, across = (row[:, None] - row).abs(), (column[:, None] - column).abs()
    index = down[:, None, :, None] * side + across[None, :, None, :]
    return table.index_select(1, index.flatten()).view(len(table), window[0] * window[1], -1)
