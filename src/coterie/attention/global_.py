"""Exact global attention: every token attends to every token, the baseline that all others are measured against.

"Attention Is All You Need", arXiv 1706.03762, by torch's scaled_dot_product_attention. Cost is quadratic in the tokens.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from coterie.attention.base import PATTERNS, GridAttention, exact_attention, register_attention


@register_attention("global")
class GlobalAttention(GridAttention):
    """Multi-head softmax attention over the whole grid; takes every pattern and grid, and no options of its own."""

    grid_dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset(PATTERNS)

    def attend(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch heads keys head_dim"],
        value: Float[Tensor, "batch heads keys head_dim"],
        *,
        grid: tuple[int, ...],
        key_grid: tuple[int, ...] | None,
        mask: Bool[Tensor, "batch keys"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        query, scale = self.scaled(query)
        allowed = None if mask is None else mask[:, None, None]
        if is_causal:
            queries, keys = query.shape[2], key.shape[2]
            if mask is None and queries == keys:  # torch aligns is_causal at the start; both agree only here
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
            causal = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
            allowed = causal if allowed is None else causal & allowed
        return exact_attention(query, key, value, allowed=allowed, scale=scale)
