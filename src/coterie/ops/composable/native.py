"""Composable attention in torch operators: runs on every device, by chunks of queries, so that memory is linear.

A chunk sees only the keys that causality and the window leave to it. Its backward recomputes the weights, by chunks as
well; the adjoint of a composition is the composition with `in` and `out` exchanged and `static` transposed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coterie.ops.composable.maps import HeadComposition

CHUNK = 2**20  # scores of all heads and batches at once, but at least LEAST queries
LEAST = 16


class _Chunk(NamedTuple):
    """Some queries, and the keys that they may see."""

    queries: slice
    keys: slice
    allowed: Tensor | None  # broadcasts to (batch, heads, queries, keys)


def _chunks(
    query: Tensor, key: Tensor, is_causal: bool, window: int | None, attn_mask: Tensor | None
) -> Iterator[_Chunk]:
    batch, heads, queries = query.shape[:3]
    keys, device = key.shape[2], query.device
    size = max(LEAST, CHUNK // (batch * heads * min(keys, 2 * window if window else keys)))
    for first in range(0, queries, size):
        last = min(first + size, queries)
        shift = keys - queries
        low = max(0, first + shift - window + 1) if window else 0
        high = last + shift if is_causal else last + shift + window - 1 if window else keys
        low, high = min(low, keys), max(0, min(high, keys))
        if low >= high:
            yield _Chunk(slice(first, last), slice(0, 0), None)
            continue
        allowed = None
        if is_causal or window:
            ahead = torch.arange(low, high, device=device) - torch.arange(first, last, device=device)[:, None] - shift
            allowed = ahead <= 0 if is_causal else torch.ones_like(ahead, dtype=torch.bool)
            if window:
                allowed = allowed & (ahead.abs() < window)
        if attn_mask is not None:
            rows = slice(None) if attn_mask.shape[2] == 1 else slice(first, last)
            columns = slice(None) if attn_mask.shape[3] == 1 else slice(low, high)
            part = attn_mask[:, :, rows, columns]
            allowed = part if allowed is None else allowed & part
        yield _Chunk(slice(first, last), slice(low, high), allowed)


def _cut(maps: HeadComposition, chunk: _Chunk, dtype: torch.dtype) -> HeadComposition:
    """The maps of a chunk, in the dtype of the arithmetic."""
    sides = [chunk.queries] * 3 + [chunk.keys] * 3 + [slice(None)]
    parts = [
        None if x is None else (x if i == 6 else x[:, side]).to(dtype)
        for i, (x, side) in enumerate(zip(maps, sides, strict=True))
    ]
    return HeadComposition(*parts)


def _adjoint(maps: HeadComposition) -> HeadComposition:
    static = None if maps.static is None else maps.static.t()
    return HeadComposition(
        maps.query_out, maps.query_in, maps.query_gate, maps.key_out, maps.key_in, maps.key_gate, static
    )


Scores = Float[Tensor, "batch heads queries keys"]
Mixed = Float[Tensor, "batch rank queries keys"]


def _mix(x: Scores, maps: HeadComposition) -> tuple[Mixed | None, Mixed | None]:
    """Σ_n x[n]·in[r,n] of the query's and of the key's part."""
    by_query = None if maps.query_in is None else torch.einsum("bnts,btrn->brts", x, maps.query_in)
    by_key = None if maps.key_in is None else torch.einsum("bnts,bsrn->brts", x, maps.key_in)
    return by_query, by_key


def _compose(x: Scores, mixed: tuple[Mixed | None, Mixed | None], maps: HeadComposition) -> Scores:
    y = x.clone()
    if maps.query_gate is not None:
        y.addcmul_(x, maps.query_gate.transpose(1, 2).unsqueeze(3))
    if maps.key_gate is not None:
        y.addcmul_(x, maps.key_gate.transpose(1, 2).unsqueeze(2))
    if mixed[0] is not None:
        y += torch.einsum("brts,btrm->bmts", mixed[0], maps.query_out)
    if mixed[1] is not None:
        y += torch.einsum("brts,bsrm->bmts", mixed[1], maps.key_out)
    if maps.static is not None:
        y += torch.einsum("bnts,nm->bmts", x, maps.static)
    return y


def _map_gradients(
    x: Scores,
    slope: Scores,
    mixed: tuple[Mixed | None, Mixed | None],
    back: tuple[Mixed | None, Mixed | None],
    maps: HeadComposition,
) -> list[Tensor | None]:
    """Gradients of the seven parts, from x, the gradient of the composed x, and what `_mix` made of either."""
    return [
        None if back[0] is None else torch.einsum("brts,bnts->btrn", back[0], x),
        None if mixed[0] is None else torch.einsum("brts,bmts->btrm", mixed[0], slope),
        None if maps.query_gate is None else torch.einsum("bnts,bnts->btn", x, slope),
        None if back[1] is None else torch.einsum("brts,bnts->bsrn", back[1], x),
        None if mixed[1] is None else torch.einsum("brts,bmts->bsrm", mixed[1], slope),
        None if maps.key_gate is None else torch.einsum("bnts,bnts->bsn", x, slope),
        None if maps.static is None else torch.einsum("bnts,bmts->nm", x, slope),
    ]


def _grouped(x: Float[Tensor, "batch heads rows dim"], kv_heads: int) -> Float[Tensor, "batch kv_heads many dim"]:
    """The rows of all query heads that share a key head, one below the other."""
    return x.reshape(x.shape[0], kv_heads, -1, x.shape[3])


def _scores(query: Tensor, key: Tensor) -> Scores:
    """query·keyᵀ for every query head."""
    return (_grouped(query, key.shape[1]) @ key.transpose(-1, -2)).view(*query.shape[:3], key.shape[2])


def forward(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    pre: HeadComposition,
    post: HeadComposition,
    is_causal: bool,
    window: int | None,
    attn_mask: Bool[Tensor, "#batch 1 #queries #keys"] | None,
    scale: float,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Output, and the log-sum-exp of every row of the composed scores (float32; float64 for float64)."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_zeros((*query.shape[:3], value.shape[3]))
    logsumexp = query.new_full(query.shape[:3], float("-inf"), dtype=wide)
    for chunk in _chunks(query, key, is_causal, window, attn_mask):
        if chunk.keys.stop == 0:
            continue
        k, v = (x[:, :, chunk.keys].to(wide) for x in (key, value))
        maps = [_cut(x, chunk, wide) for x in (pre, post)]
        scores = _scores(query[:, :, chunk.queries].to(wide) * scale, k)
        scores = _compose(scores, _mix(scores, maps[0]), maps[0])
        weights, logsumexp[:, :, chunk.queries] = _softmax(scores, chunk.allowed)
        weights = _compose(weights, _mix(weights, maps[1]), maps[1])
        output[:, :, chunk.queries] = (_grouped(weights, v.shape[1]) @ v).view(*weights.shape[:3], -1).to(query.dtype)
    return output, logsumexp


def _softmax(scores: Scores, allowed: Tensor | None) -> tuple[Scores, Float[Tensor, "batch heads queries"]]:
    """Weights, in the memory of the scores, and the log-sum-exp; zeros and -inf for a row without keys."""
    if allowed is not None:
        scores.masked_fill_(~allowed, float("-inf"))
    peak = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
    return scores.div_(total.clamp_min(torch.finfo(scores.dtype).tiny)), (peak + total.log()).squeeze(-1)


def backward(
    grad: Float[Tensor, "batch heads queries value_dim"],
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    pre: HeadComposition,
    post: HeadComposition,
    logsumexp: Float[Tensor, "batch heads queries"],
    is_causal: bool,
    window: int | None,
    attn_mask: Bool[Tensor, "#batch 1 #queries #keys"] | None,
    scale: float,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Gradients of query, key and value, of the parts of `pre`, and of the parts of `post`."""
    wide = logsumexp.dtype
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value))
    slopes = [[None if x is None else torch.zeros_like(x, dtype=wide) for x in maps] for maps in (pre, post)]
    for chunk in _chunks(query, key, is_causal, window, attn_mask):
        if chunk.keys.stop == 0:
            continue
        k, v = (x[:, :, chunk.keys].to(wide) for x in (key, value))
        q, dy = query[:, :, chunk.queries].to(wide) * scale, grad[:, :, chunk.queries].to(wide)
        before, after = (_cut(x, chunk, wide) for x in (pre, post))

        scores = _scores(q, k)
        mixed = _mix(scores, before)
        weights, _ = _softmax(_compose(scores, mixed, before), chunk.allowed)

        mixed_weights = _mix(weights, after)
        composed = _compose(weights, mixed_weights, after)
        dv[:, :, chunk.keys] += _grouped(composed, v.shape[1]).transpose(-1, -2) @ _grouped(dy, v.shape[1])
        slope = _scores(dy, v)
        back = _mix(slope, _adjoint(after))
        _add(slopes[1], _map_gradients(weights, slope, mixed_weights, back, after), chunk)

        slope = _compose(slope, back, _adjoint(after))
        slope = weights * (slope - (weights * slope).sum(-1, keepdim=True))
        back = _mix(slope, _adjoint(before))
        _add(slopes[0], _map_gradients(scores, slope, mixed, back, before), chunk)

        slope = _grouped(_compose(slope, back, _adjoint(before)), k.shape[1])
        dq[:, :, chunk.queries] = (slope @ k).view(q.shape) * scale
        dk[:, :, chunk.keys] += slope.transpose(-1, -2) @ _grouped(q, k.shape[1])
    results = [x.to(like.dtype) for x, like in zip((dq, dk, dv), (query, key, value), strict=True)]
    return results, _rounded(slopes[0], pre), _rounded(slopes[1], post)


def _add(totals: list[Tensor | None], parts: list[Tensor | None], chunk: _Chunk) -> None:
    """Add the gradients of a chunk's maps where they belong."""
    sides = [chunk.queries] * 3 + [chunk.keys] * 3
    for i, (total, part) in enumerate(zip(totals, parts, strict=True)):
        if total is not None and part is not None:
            (total if i == 6 else total[:, sides[i]]).add_(part)


def _rounded(slopes: list[Tensor | None], maps: HeadComposition) -> list[Tensor | None]:
    return [None if x is None or like is None else x.to(like.dtype) for x, like in zip(slopes, maps, strict=True)]
