"""What the Triton kernels of composable attention do with a tile: load it, mask it, compose it, differentiate it.

A tile of scores is (heads, queries, keys); sizes are powers of two, and what lies outside of the tensors is masked.
Maps are packed as `packing.pack` does. A map that does not exist is None, and costs nothing.
"""

import triton
import triton.language as tl


@triton.jit
def rows(base, head, token, tokens, dim, is_head, DIM: tl.constexpr):
    """(heads, tokens, dims) of a contiguous (batch * heads, tokens, DIM) tensor; zeros outside."""
    place = (head.to(tl.int64)[:, None] * tokens + token[None, :]) * DIM
    inside = is_head[:, None] & (token < tokens)[None, :]
    return tl.load(
        base + place[:, :, None] + dim[None, None, :], mask=inside[:, :, None] & (dim < DIM)[None, None, :], other=0.0
    )


@triton.jit
def store_rows(base, head, token, tokens, dim, is_head, x, DIM: tl.constexpr):
    """The inverse of `rows`: x (heads, tokens, dims) in the dtype of the tensor; nothing outside."""
    place = (head.to(tl.int64)[:, None] * tokens + token[None, :]) * DIM
    inside = is_head[:, None] & (token < tokens)[None, :]
    mask = inside[:, :, None] & (dim < DIM)[None, None, :]
    tl.store(base + place[:, :, None] + dim[None, None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def products(a, b, head_a, head_b, t, s, queries, keys, is_head, DIM: tl.constexpr, STEP: tl.constexpr):
    """a·bᵀ of all heads: (heads, BM, BK). Operands come in steps, so that they do not crowd the registers."""
    result = tl.zeros((head_a.shape[0], t.shape[0], s.shape[0]), tl.float32)
    for first in tl.static_range(0, DIM, STEP):
        dim = first + tl.arange(0, STEP)
        x = rows(a, head_a, t, queries, dim, is_head, DIM)
        y = rows(b, head_b, s, keys, dim, is_head, DIM)
        result = tl.dot(x, tl.permute(y, (0, 2, 1)), result, input_precision="ieee")
    return result


@triton.jit
def visible(t, s, b, queries, keys, window, mask, mask_b, mask_t, mask_s, CAUSAL: tl.constexpr):
    """Which of the tile's queries may attend to which of its keys."""
    ahead = s[None, :] - (t[:, None] + (keys - queries))
    allowed = (t < queries)[:, None] & (s < keys)[None, :]
    if CAUSAL:
        allowed = allowed & (ahead <= 0)
    if window > 0:
        allowed = allowed & (ahead < window) & (ahead > -window)
    if mask is not None:
        place = b.to(tl.int64) * mask_b + t.to(tl.int64)[:, None] * mask_t + s.to(tl.int64)[None, :] * mask_s
        allowed = allowed & (tl.load(mask + place, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def keys_of(first, queries, keys, window, CAUSAL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """The range of keys, in whole tiles, that queries [first, first + BM) may see by position."""
    shift = keys - queries
    low, high = 0, keys
    if window > 0:
        low = tl.maximum(0, first + shift - window + 1) // BK * BK
        high = tl.minimum(high, first + BM + shift + window - 1)
    if CAUSAL:
        high = tl.minimum(high, first + BM + shift)
    return low, high


@triton.jit
def queries_of(first, queries, keys, window, CAUSAL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """The range of queries, in whole tiles, that may see any of the keys [first, first + BK)."""
    shift = keys - queries
    low, high = 0, queries
    if window > 0:
        low = first - shift - window + 1
        high = tl.minimum(high, first + BK - shift + window - 1)
    if CAUSAL:
        low = tl.maximum(low, first - shift)
    return tl.maximum(0, low) // BM * BM, high


# -------------------------------------------------------------------------------- composition
@triton.jit
def _map(base, b, token, tokens, row, n, heads, ROWS: tl.constexpr):
    """(heads, tokens): one row of a packed side, (batch, tokens, ROWS, heads)."""
    place = ((b.to(tl.int64) * tokens + token) * ROWS + row) * heads
    return tl.load(base + place[None, :] + n[:, None], mask=(n < heads)[:, None] & (token < tokens)[None, :], other=0.0)


@triton.jit
def _mixed(x, base, b, token, tokens, row, n, heads, axis: tl.constexpr, ROWS: tl.constexpr):
    """Σ_n x[n]·map[row][n]: (BM, BK); axis 1 for a map of queries, 2 for one of keys."""
    m = _map(base, b, token, tokens, row, n, heads, ROWS)
    return tl.sum(x * (m[:, :, None] if axis == 1 else m[:, None, :]), 0)


@triton.jit
def compose(
    x, query, key, static, b, t, s, queries, keys, n, heads,
    TRANSPOSED: tl.constexpr, QUERY_RANK: tl.constexpr, KEY_RANK: tl.constexpr,
):  # fmt: skip
    """The composition of a tile, or its transpose: `in` and `out` exchanged."""
    y = x
    if query is not None:
        rows: tl.constexpr = 2 * QUERY_RANK + 1
        y = x * _map(query, b, t, queries, 2 * QUERY_RANK, n, heads, rows)[:, :, None]
        for r in tl.static_range(QUERY_RANK):
            into = r + QUERY_RANK if TRANSPOSED else r
            out = r if TRANSPOSED else r + QUERY_RANK
            mixed = _mixed(x, query, b, t, queries, into, n, heads, 1, rows)
            y += _map(query, b, t, queries, out, n, heads, rows)[:, :, None] * mixed[None, :, :]
    if key is not None:
        key_rows: tl.constexpr = 2 * KEY_RANK + 1
        y += x * _map(key, b, s, keys, 2 * KEY_RANK, n, heads, key_rows)[:, None, :]
        for r in tl.static_range(KEY_RANK):
            into = r + KEY_RANK if TRANSPOSED else r
            out = r if TRANSPOSED else r + KEY_RANK
            mixed = _mixed(x, key, b, s, keys, into, n, heads, 2, key_rows)
            y += _map(key, b, s, keys, out, n, heads, key_rows)[:, None, :] * mixed[None, :, :]
    if static is not None:
        place = n[None, :] * heads + n[:, None] if not TRANSPOSED else n[:, None] * heads + n[None, :]
        weights = tl.load(static + place, mask=(n < heads)[:, None] & (n < heads)[None, :], other=0.0)
        flat = tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))
        y += tl.reshape(tl.dot(weights, flat, input_precision="ieee"), (x.shape[0], x.shape[1], x.shape[2]))
    return y


@triton.jit
def _add(base, b, token, tokens, row, n, heads, x, ROWS: tl.constexpr):
    place = ((b.to(tl.int64) * tokens + token) * ROWS + row) * heads
    pointers = base + place[None, :] + n[:, None]
    inside = (n < heads)[:, None] & (token < tokens)[None, :]
    tl.store(pointers, tl.load(pointers, mask=inside, other=0.0) + x, mask=inside)


@triton.jit
def add_gradients(grad, base, x, dy, b, token, tokens, n, heads, axis: tl.constexpr, RANK: tl.constexpr):
    """Add a tile's part of the gradients of one side's maps; axis 1 for the query's side, 2 for the key's."""
    rows: tl.constexpr = 2 * RANK + 1
    over: tl.constexpr = 3 - axis
    _add(grad, b, token, tokens, 2 * RANK, n, heads, tl.sum(x * dy, over), rows)
    for r in tl.static_range(RANK):
        into = _mixed(dy, base, b, token, tokens, r + RANK, n, heads, axis, rows)
        _add(grad, b, token, tokens, r, n, heads, tl.sum(x * into[None, :, :], over), rows)
        out = _mixed(x, base, b, token, tokens, r, n, heads, axis, rows)
        _add(grad, b, token, tokens, r + RANK, n, heads, tl.sum(dy * out[None, :, :], over), rows)


@triton.jit
def add_static(sums, x, dy):
    """sums[n, m] + Σ x[n]·dy[m] over the tile."""
    x = tl.reshape(x, (x.shape[0], x.shape[1] * x.shape[2]))
    dy = tl.reshape(dy, (dy.shape[0], dy.shape[1] * dy.shape[2]))
    return tl.dot(x, tl.trans(dy), sums, input_precision="ieee")


@triton.jit
def load_norm(logsumexp, b, n, t, heads, queries):
    """(heads, queries) as it is subtracted from scores: where there is no key, or no query, weights become zero."""
    place = (b.to(tl.int64) * heads + n)[:, None] * queries + t[None, :]
    norm = tl.load(logsumexp + place, mask=(n < heads)[:, None] & (t < queries)[None, :], other=float("inf"))
    return tl.where(norm == float("-inf"), float("inf"), norm)
