"""The definition of composable attention, in plain torch: short, differentiable, exact in float64, quadratic in memory.

Dynamically Composable Multi-Head Attention, arXiv 2405.08553 (ICML 2024). Over all heads n, for query t and key s:

    L[n] = scale <q_n(t), k_n(s)>            L ← compose(L; pre)
    P[n] = softmax over the allowed s of L   P ← compose(P; post)
    y_m(t) = Σ_s P[m] v_m(s)

The mask comes after the first composition; the composed weights are signed and do not sum to one.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coterie.ops.composable.maps import HeadComposition


def compose(
    scores: Float[Tensor, "batch heads queries keys"], maps: HeadComposition
) -> Float[Tensor, "batch heads queries keys"]:
    """Every head m receives from all heads n at the same (query, key)."""
    maps = HeadComposition(*(None if x is None else x.to(scores.dtype) for x in maps))
    result = scores
    if maps.static is not None:
        result = result + torch.einsum("bnts,nm->bmts", scores, maps.static)
    if maps.query_in is not None and maps.query_out is not None:
        mixed = torch.einsum("bnts,btrn->brts", scores, maps.query_in)
        result = result + torch.einsum("brts,btrm->bmts", mixed, maps.query_out)
    if maps.key_in is not None and maps.key_out is not None:
        mixed = torch.einsum("bnts,bsrn->brts", scores, maps.key_in)
        result = result + torch.einsum("brts,bsrm->bmts", mixed, maps.key_out)
    if maps.query_gate is not None:
        result = result + scores * maps.query_gate.transpose(1, 2).unsqueeze(-1)
    if maps.key_gate is not None:
        result = result + scores * maps.key_gate.transpose(1, 2).unsqueeze(-2)
    return result


def allowed_pairs(
    queries: int,
    keys: int,
    is_causal: bool,
    window: int | None,
    attn_mask: Bool[Tensor, "#batch 1 #queries #keys"] | None,
    device: torch.device,
) -> Bool[Tensor, "#batch 1 queries keys"]:
    """Which query may attend to which key; the last query stands at the last key."""
    ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device).unsqueeze(1) - (keys - queries)
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if is_causal:
        allowed = allowed & (ahead <= 0)
    if window is not None:
        allowed = allowed & (ahead.abs() < window)
    return allowed[None, None] if attn_mask is None else allowed & attn_mask


def composable_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    pre: HeadComposition,
    post: HeadComposition,
    is_causal: bool,
    window: int | None,
    attn_mask: Bool[Tensor, "#batch 1 #queries #keys"] | None,
    scale: float,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """The three lines above, in float32 for lower dtypes."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.to(wide).repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = compose(scale * query.to(wide) @ key.transpose(-1, -2), pre)
    allowed = allowed_pairs(query.shape[2], key.shape[2], is_causal, window, attn_mask, query.device)
    empty = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed, float("-inf")).masked_fill(empty, 0.0).softmax(-1)
    weights = compose(weights.masked_fill(~allowed, 0.0), post)
    return (weights @ value).to(query.dtype)
