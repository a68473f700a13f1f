"""The definition in torch operators."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def forward(qkv: Tensor, groups: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float) -> Tensor:
    """Gather the groups, attend, put back."""
    batch, tokens, _, heads, head_dim = qkv.shape
    real = groups >= 0
    query, key, value = qkv[:, groups.clamp(min=0)].permute(3, 0, 1, 4, 2, 5)
    allowed = real.expand(batch, -1, -1)
    if key_mask is not None:
        allowed = allowed & key_mask[:, groups.clamp(min=0)]
    allowed = allowed[:, :, None, None]  # (batch, groups, 1, 1, group tokens)
    some = allowed.any(-1, keepdim=True)
    logits = torch.zeros((), dtype=qkv.dtype, device=qkv.device) if bias is None else bias
    logits = torch.where(allowed | ~some, logits, float("-inf"))
    y = scaled_dot_product_attention(query, key, value, attn_mask=logits, scale=scale)
    y = y.masked_fill(~some, 0.0)  # (batch, groups, heads, group tokens, head_dim)
    y = y.permute(0, 1, 3, 2, 4).flatten(1, 2)[:, real.flatten()]
    return qkv.new_zeros(batch, tokens, heads, head_dim).index_copy(1, groups[real], y)
