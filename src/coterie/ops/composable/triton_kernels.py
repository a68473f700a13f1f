"""Composable attention on a GPU, forward and backward, in Triton.

Every head takes from every other, so a program holds all heads of a tile: scores are (heads, queries, keys) blocks in
registers, products are batched over heads on the tensor cores, and a composition is a few sums over the first axis.

    statistics   walks over the keys of a tile of queries: scores, first composition, running maximum and sum
    output       walks again: weights, second composition, products with the values
    delta        δ[n,t] = Σ_s P·dP, which takes all keys; and the gradients of the query's part of `post`
    dq           walks over keys: the gradient of the scores; dq, and the gradients of the query's part of `pre`
    dv           walks over the queries of a tile of keys: dv, and the gradients of the key's part of `post`
    dk           the same for dk, and the key's part of `pre`

Scores are recomputed in each, from the saved log-sum-exp; tiles that causality or the window leaves out are skipped.
Where the sums of all heads do not fit in registers (many wide heads), output, dq, dv and dk are cut into slices of the
head dimension, and each slice is a program of its own. Products of float32 are exact ("ieee"), sums and statistics are
float32. No atomics: each sum has one order. Sums of the maps' gradients that a program owns grow in global memory.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

from coterie.ops.composable.maps import HeadComposition
from coterie.ops.composable.packing import even_rank, unpack
from coterie.ops.composable.packing import pack as pack_maps
from coterie.ops.composable.triton_tiles import (
    add_gradients,
    add_static,
    compose,
    keys_of,
    load_norm,
    products,
    queries_of,
    rows,
    store_rows,
    visible,
)

# -------------------------------------------------------------------------------- kernels
_SIZES = ["heads", "group", "queries", "keys", "window", "mask_b", "mask_t", "mask_s"]


@triton.jit(do_not_specialize=_SIZES)
def _statistics_kernel(
    query, key, logsumexp, pre_query, pre_key, pre_static, mask, mask_b, mask_t, mask_s,
    heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, QUERY_RANK: tl.constexpr, KEY_RANK: tl.constexpr,
):  # fmt: skip
    first, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM, tl.program_id(1)  # the longest rows first
    n = tl.arange(0, HEADS)
    is_head, head, kv_head = n < heads, b * heads + n, (b * heads + n) // group
    t = first + tl.arange(0, BM)
    peak = tl.full((HEADS, BM), float("-inf"), tl.float32)
    total = tl.zeros((HEADS, BM), tl.float32)
    low, high = keys_of(first, queries, keys, window, CAUSAL, BM, BK)
    for block in range(low, high, BK):
        s = block + tl.arange(0, BK)
        x = products(query, key, head, kv_head, t, s, queries, keys, is_head, DIM, STEP) * scale
        x = compose(x, pre_query, pre_key, pre_static, b, t, s, queries, keys, n, heads, False, QUERY_RANK, KEY_RANK)
        allowed = visible(t, s, b, queries, keys, window, mask, mask_b, mask_t, mask_s, CAUSAL)
        x = tl.where(allowed[None, :, :], x, float("-inf"))
        higher = tl.maximum(peak, tl.max(x, 2))
        off = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - off) + tl.sum(tl.exp(x - off[:, :, None]), 2)
        peak = higher
    place = head.to(tl.int64)[:, None] * queries + t[None, :]
    inside = is_head[:, None] & (t < queries)[None, :]
    tl.store(logsumexp + place, tl.where(total > 0, peak + tl.log(total), float("-inf")), mask=inside)


@triton.jit
def _scores_and_weights(
    query, key, norm, pre_query, pre_key, pre_static, mask, mask_b, mask_t, mask_s,
    b, n, t, s, heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, QUERY_RANK: tl.constexpr, KEY_RANK: tl.constexpr,
):  # fmt: skip
    """A tile's scores before the first composition, and its weights before the second."""
    head = b * heads + n
    x = products(query, key, head, head // group, t, s, queries, keys, n < heads, DIM, STEP) * scale
    y = compose(x, pre_query, pre_key, pre_static, b, t, s, queries, keys, n, heads, False, QUERY_RANK, KEY_RANK)
    allowed = visible(t, s, b, queries, keys, window, mask, mask_b, mask_t, mask_s, CAUSAL)
    return x, tl.exp(tl.where(allowed[None, :, :], y, float("-inf")) - norm[:, :, None])


@triton.jit(do_not_specialize=_SIZES)
def _output_kernel(
    query, key, value, output, logsumexp, pre_query, pre_key, pre_static, post_query, post_key, post_static,
    mask, mask_b, mask_t, mask_s, heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr,
    SLICE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRE_QUERY_RANK: tl.constexpr,
    PRE_KEY_RANK: tl.constexpr, POST_QUERY_RANK: tl.constexpr, POST_KEY_RANK: tl.constexpr,
):  # fmt: skip
    first, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM, tl.program_id(1)
    n = tl.arange(0, HEADS)
    is_head, head, kv_head = n < heads, b * heads + n, (b * heads + n) // group
    t = first + tl.arange(0, BM)
    dim = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    norm = load_norm(logsumexp, b, n, t, heads, queries)
    y = tl.zeros((HEADS, BM, SLICE), tl.float32)
    low, high = keys_of(first, queries, keys, window, CAUSAL, BM, BK)
    for block in range(low, high, BK):
        s = block + tl.arange(0, BK)
        _, w = _scores_and_weights(
            query, key, norm, pre_query, pre_key, pre_static, mask, mask_b, mask_t, mask_s,
            b, n, t, s, heads, group, queries, keys, window, scale, CAUSAL, DIM, STEP, PRE_QUERY_RANK, PRE_KEY_RANK,
        )  # fmt: skip
        w = compose(
            w, post_query, post_key, post_static, b, t, s, queries, keys, n, heads, False,
            POST_QUERY_RANK, POST_KEY_RANK,
        )  # fmt: skip
        v = rows(value, kv_head, s, keys, dim, is_head, VALUE_DIM)
        y = tl.dot(w.to(v.dtype), v, y, input_precision="ieee")
    store_rows(output, head, t, queries, dim, is_head, y, VALUE_DIM)


@triton.jit(do_not_specialize=_SIZES)
def _delta_kernel(
    grad, query, key, value, logsumexp, delta, pre_query, pre_key, pre_static, post_query, post_key, post_static,
    grad_query_side, grad_static, mask, mask_b, mask_t, mask_s, heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRE_QUERY_RANK: tl.constexpr, PRE_KEY_RANK: tl.constexpr,
    POST_QUERY_RANK: tl.constexpr, POST_KEY_RANK: tl.constexpr,
):  # fmt: skip
    tile, b = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, HEADS)
    is_head, head, kv_head = n < heads, b * heads + n, (b * heads + n) // group
    t = tile * BM + tl.arange(0, BM)
    norm = load_norm(logsumexp, b, n, t, heads, queries)
    d = tl.zeros((HEADS, BM), tl.float32)
    sums = tl.zeros((HEADS, HEADS), tl.float32)
    low, high = keys_of(tile * BM, queries, keys, window, CAUSAL, BM, BK)
    for block in range(low, high, BK):
        s = block + tl.arange(0, BK)
        _, w = _scores_and_weights(
            query, key, norm, pre_query, pre_key, pre_static, mask, mask_b, mask_t, mask_s,
            b, n, t, s, heads, group, queries, keys, window, scale, CAUSAL, DIM, STEP, PRE_QUERY_RANK, PRE_KEY_RANK,
        )  # fmt: skip
        dy = products(grad, value, head, kv_head, t, s, queries, keys, is_head, VALUE_DIM, STEP)
        if post_query is not None:
            add_gradients(grad_query_side, post_query, w, dy, b, t, queries, n, heads, 1, POST_QUERY_RANK)
        if post_static is not None:
            sums = add_static(sums, w, dy)
        dy = compose(
            dy, post_query, post_key, post_static, b, t, s, queries, keys, n, heads, True,
            POST_QUERY_RANK, POST_KEY_RANK,
        )  # fmt: skip
        d += tl.sum(w * dy, 2)
        tl.debug_barrier()  # the next round adds to what this one has stored
    inside = is_head[:, None] & (t < queries)[None, :]
    tl.store(delta + head.to(tl.int64)[:, None] * queries + t[None, :], d, mask=inside)
    if post_static is not None:
        place = (b.to(tl.int64) * tl.num_programs(0) + tile) * HEADS * HEADS
        tl.store(grad_static + place + n[:, None] * HEADS + n[None, :], sums)


@triton.jit
def _score_gradient(
    grad, query, key, value, norm, d, pre_query, pre_key, pre_static, post_query, post_key, post_static,
    mask, mask_b, mask_t, mask_s, b, n, t, s, heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr,
    PRE_QUERY_RANK: tl.constexpr, PRE_KEY_RANK: tl.constexpr, POST_QUERY_RANK: tl.constexpr,
    POST_KEY_RANK: tl.constexpr,
):  # fmt: skip
    """A tile's scores, and the gradient of the composed ones."""
    head = b * heads + n
    x, w = _scores_and_weights(
        query, key, norm, pre_query, pre_key, pre_static, mask, mask_b, mask_t, mask_s,
        b, n, t, s, heads, group, queries, keys, window, scale, CAUSAL, DIM, STEP, PRE_QUERY_RANK, PRE_KEY_RANK,
    )  # fmt: skip
    dy = products(grad, value, head, head // group, t, s, queries, keys, n < heads, VALUE_DIM, STEP)
    dy = compose(
        dy, post_query, post_key, post_static, b, t, s, queries, keys, n, heads, True, POST_QUERY_RANK, POST_KEY_RANK
    )
    return x, w * (dy - d[:, :, None])


@triton.jit(do_not_specialize=_SIZES)
def _query_gradient_kernel(
    grad, query, key, value, logsumexp, delta, grad_query, pre_query, pre_key, pre_static, post_query, post_key,
    post_static, grad_query_side, grad_static, mask, mask_b, mask_t, mask_s, heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr,
    SLICE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRE_QUERY_RANK: tl.constexpr,
    PRE_KEY_RANK: tl.constexpr, POST_QUERY_RANK: tl.constexpr, POST_KEY_RANK: tl.constexpr,
):  # fmt: skip
    tile, b, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, HEADS)
    is_head, head, kv_head = n < heads, b * heads + n, (b * heads + n) // group
    t = tile * BM + tl.arange(0, BM)
    dim = piece * SLICE + tl.arange(0, SLICE)
    norm = load_norm(logsumexp, b, n, t, heads, queries)
    inside = is_head[:, None] & (t < queries)[None, :]
    d = tl.load(delta + head.to(tl.int64)[:, None] * queries + t[None, :], mask=inside, other=0.0)
    dq = tl.zeros((HEADS, BM, SLICE), tl.float32)
    sums = tl.zeros((HEADS, HEADS), tl.float32)
    low, high = keys_of(tile * BM, queries, keys, window, CAUSAL, BM, BK)
    for block in range(low, high, BK):
        s = block + tl.arange(0, BK)
        x, dx = _score_gradient(
            grad, query, key, value, norm, d, pre_query, pre_key, pre_static, post_query, post_key, post_static,
            mask, mask_b, mask_t, mask_s, b, n, t, s, heads, group, queries, keys, window, scale, CAUSAL, DIM,
            VALUE_DIM, STEP, PRE_QUERY_RANK, PRE_KEY_RANK, POST_QUERY_RANK, POST_KEY_RANK,
        )  # fmt: skip
        if pre_query is not None and piece == 0:
            add_gradients(grad_query_side, pre_query, x, dx, b, t, queries, n, heads, 1, PRE_QUERY_RANK)
        if pre_static is not None:
            sums = add_static(sums, x, dx)
        dx = compose(
            dx, pre_query, pre_key, pre_static, b, t, s, queries, keys, n, heads, True, PRE_QUERY_RANK, PRE_KEY_RANK
        )
        k = rows(key, kv_head, s, keys, dim, is_head, DIM)
        dq = tl.dot(dx.to(k.dtype), k, dq, input_precision="ieee")
        tl.debug_barrier()
    store_rows(grad_query, head, t, queries, dim, is_head, dq * scale, DIM)
    if pre_static is not None and piece == 0:
        place = (b.to(tl.int64) * tl.num_programs(0) + tile) * HEADS * HEADS
        tl.store(grad_static + place + n[:, None] * HEADS + n[None, :], sums)


@triton.jit(do_not_specialize=_SIZES)
def _value_gradient_kernel(
    grad, query, key, value, logsumexp, grad_value, pre_query, pre_key, pre_static, post_query, post_key, post_static,
    grad_key_side, mask, mask_b, mask_t, mask_s, heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr,
    SLICE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRE_QUERY_RANK: tl.constexpr,
    PRE_KEY_RANK: tl.constexpr, POST_QUERY_RANK: tl.constexpr, POST_KEY_RANK: tl.constexpr,
):  # fmt: skip
    first, b, piece = tl.program_id(0) * BK, tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, HEADS)
    is_head, head, kv_head = n < heads, b * heads + n, (b * heads + n) // group
    s = first + tl.arange(0, BK)
    dim = piece * SLICE + tl.arange(0, SLICE)
    dv = tl.zeros((HEADS, BK, SLICE), tl.float32)
    low, high = queries_of(first, queries, keys, window, CAUSAL, BM, BK)
    for block in range(low, high, BM):
        t = block + tl.arange(0, BM)
        norm = load_norm(logsumexp, b, n, t, heads, queries)
        _, w = _scores_and_weights(
            query, key, norm, pre_query, pre_key, pre_static, mask, mask_b, mask_t, mask_s,
            b, n, t, s, heads, group, queries, keys, window, scale, CAUSAL, DIM, STEP, PRE_QUERY_RANK, PRE_KEY_RANK,
        )  # fmt: skip
        if post_key is not None and piece == 0:
            dy = products(grad, value, head, kv_head, t, s, queries, keys, is_head, VALUE_DIM, STEP)
            add_gradients(grad_key_side, post_key, w, dy, b, s, keys, n, heads, 2, POST_KEY_RANK)
        w = compose(
            w, post_query, post_key, post_static, b, t, s, queries, keys, n, heads, False,
            POST_QUERY_RANK, POST_KEY_RANK,
        )  # fmt: skip
        g = rows(grad, head, t, queries, dim, is_head, VALUE_DIM)
        dv = tl.dot(tl.permute(w, (0, 2, 1)).to(g.dtype), g, dv, input_precision="ieee")
        tl.debug_barrier()
    store_rows(grad_value, head, s, keys, dim, is_head, dv, VALUE_DIM)


@triton.jit(do_not_specialize=_SIZES)
def _key_gradient_kernel(
    grad, query, key, value, logsumexp, delta, grad_key, pre_query, pre_key, pre_static, post_query, post_key,
    post_static, grad_key_side, mask, mask_b, mask_t, mask_s, heads, group, queries, keys, window, scale,
    CAUSAL: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, STEP: tl.constexpr,
    SLICE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, PRE_QUERY_RANK: tl.constexpr,
    PRE_KEY_RANK: tl.constexpr, POST_QUERY_RANK: tl.constexpr, POST_KEY_RANK: tl.constexpr,
):  # fmt: skip
    first, b, piece = tl.program_id(0) * BK, tl.program_id(1), tl.program_id(2)
    n = tl.arange(0, HEADS)
    is_head, head = n < heads, b * heads + n
    s = first + tl.arange(0, BK)
    dim = piece * SLICE + tl.arange(0, SLICE)
    dk = tl.zeros((HEADS, BK, SLICE), tl.float32)
    low, high = queries_of(first, queries, keys, window, CAUSAL, BM, BK)
    for block in range(low, high, BM):
        t = block + tl.arange(0, BM)
        norm = load_norm(logsumexp, b, n, t, heads, queries)
        inside = is_head[:, None] & (t < queries)[None, :]
        d = tl.load(delta + head.to(tl.int64)[:, None] * queries + t[None, :], mask=inside, other=0.0)
        x, dx = _score_gradient(
            grad, query, key, value, norm, d, pre_query, pre_key, pre_static, post_query, post_key, post_static,
            mask, mask_b, mask_t, mask_s, b, n, t, s, heads, group, queries, keys, window, scale, CAUSAL, DIM,
            VALUE_DIM, STEP, PRE_QUERY_RANK, PRE_KEY_RANK, POST_QUERY_RANK, POST_KEY_RANK,
        )  # fmt: skip
        if pre_key is not None and piece == 0:
            add_gradients(grad_key_side, pre_key, x, dx, b, s, keys, n, heads, 2, PRE_KEY_RANK)
        dx = compose(
            dx, pre_query, pre_key, pre_static, b, t, s, queries, keys, n, heads, True, PRE_QUERY_RANK, PRE_KEY_RANK
        )
        q = rows(query, head, t, queries, dim, is_head, DIM)
        dk = tl.dot(tl.permute(dx, (0, 2, 1)).to(q.dtype), q, dk, input_precision="ieee")
        tl.debug_barrier()
    store_rows(grad_key, head, s, keys, dim, is_head, dk * scale, DIM)


# -------------------------------------------------------------------------------- host
class Blocks(NamedTuple):
    """Heads as padded, queries and keys of a tile, columns of a product per step and per slice, warps."""

    heads: int
    queries: int
    keys: int
    step: int
    slice: int
    warps: int


TILE = 4096  # scores of a tile, all heads; half as many for float32
SUMS = 16384  # sums of a program, all heads


def choose_blocks(heads: int, dim: int, static: bool, itemsize: int) -> Blocks:
    """A tile holds at most `TILE` scores and a program at most `SUMS` sums where the least size of a product, 16,
    allows it, to stay within 255 registers a thread; more heads take more warps. A static map is a product over heads,
    so there are at least 16."""
    padded = max(triton.next_power_of_2(heads), 16 if static else 1)
    side = max(16, triton.next_power_of_2(dim))
    queries = 32 if padded <= 4 else 16
    keys = min(64, max(16, TILE * 2 // (padded * queries * itemsize)))
    most = max(16, SUMS // (padded * max(queries, keys)))
    warps = 4 if padded <= 4 else 8 if padded <= 16 else 16
    return Blocks(padded, queries, keys, min(16 if padded > 32 else 32, side), min(side, most), warps)


def launch(blocks: Blocks) -> dict[str, Any]:
    """One stage, as tiles of all heads would not fit in shared memory twice; multiply-adds in one instruction."""
    return {"num_warps": blocks.warps, "num_stages": 1, "enable_fp_fusion": True}


class _Call:
    """Everything that the kernels share: packed maps, mask, sizes, blocks."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pre: HeadComposition,
        post: HeadComposition,
        is_causal: bool,
        window: int | None,
        attn_mask: Tensor | None,
        scale: float,
    ) -> None:
        self.query, self.key, self.value = query.contiguous(), key.contiguous(), value.contiguous()
        self.pre, self.post = pack_maps(pre, torch.float32), pack_maps(post, torch.float32)
        batch, heads, queries, dim = query.shape
        static = pre.static is not None or post.static is not None
        self.blocks = choose_blocks(heads, max(dim, value.shape[3]), static, query.element_size())
        mask, strides = None, (0, 0, 0)
        if attn_mask is not None:
            mask = attn_mask.expand(batch, 1, queries, key.shape[2])[:, 0].view(torch.uint8)
            strides = (mask.stride(0), mask.stride(1), mask.stride(2))
        self.mask = (mask, *strides)
        self.sizes = (heads, heads // key.shape[1], queries, key.shape[2], window or 0, scale)
        self.query_tiles = (triton.cdiv(queries, self.blocks.queries), batch)
        self.key_tiles = (triton.cdiv(key.shape[2], self.blocks.keys), batch)
        self.constants = {
            "CAUSAL": is_causal, "HEADS": self.blocks.heads, "DIM": dim, "STEP": self.blocks.step,
            "BM": self.blocks.queries, "BK": self.blocks.keys, **launch(self.blocks),
        }  # fmt: skip
        self.ranks = {
            f"{name}_{side}_RANK": even_rank(getattr(maps, f"{side.lower()}_in"))
            for name, maps in (("PRE", pre), ("POST", post))
            for side in ("QUERY", "KEY")
        }

    def slices(self, dim: int) -> int:
        return triton.cdiv(dim, self.blocks.slice)


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'; in the interpreter there is none."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


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
    """Output, and the log-sum-exp of every row of the composed scores in float32."""
    call = _Call(query, key, value, pre, post, is_causal, window, attn_mask, scale)
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    ranks = {"QUERY_RANK": call.ranks["PRE_QUERY_RANK"], "KEY_RANK": call.ranks["PRE_KEY_RANK"]}
    with _on_device_of(query):
        _statistics_kernel[call.query_tiles](
            call.query, call.key, logsumexp, *call.pre, *call.mask, *call.sizes, **call.constants, **ranks
        )
        _output_kernel[(*call.query_tiles, call.slices(value.shape[3]))](
            call.query, call.key, call.value, output, logsumexp, *call.pre, *call.post, *call.mask, *call.sizes,
            VALUE_DIM=value.shape[3], SLICE=call.blocks.slice, **call.constants, **call.ranks,
        )  # fmt: skip
    return output, logsumexp


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
    call = _Call(query, key, value, pre, post, is_causal, window, attn_mask, scale)
    batch, heads, _, dim = query.shape
    keys, value_dim = value.shape[2:]
    grad, logsumexp = grad.contiguous(), logsumexp.contiguous()
    inputs = (grad, call.query, call.key, call.value, logsumexp)
    maps = (*call.pre, *call.post)
    delta = torch.empty_like(logsumexp)
    grad_query = query.new_empty(query.shape)
    # of each query head; those that share a key head are summed in the end
    shared = heads != key.shape[1]
    grad_key, grad_value = (
        torch.empty(batch, heads, keys, n, dtype=torch.float32 if shared else query.dtype, device=query.device)
        for n in (dim, value_dim)
    )
    (pre_query, pre_key), (post_query, post_key) = (
        [None if x is None else torch.zeros_like(x) for x in side[:2]] for side in (call.pre, call.post)
    )
    statics = [
        None if side[2] is None else query.new_empty(*call.query_tiles, *[call.blocks.heads] * 2, dtype=torch.float32)
        for side in (call.pre, call.post)
    ]
    constants: dict[str, Any] = {"VALUE_DIM": value_dim, **call.constants, **call.ranks}
    sliced = constants | {"SLICE": call.blocks.slice}
    rest = (*call.mask, *call.sizes)
    with _on_device_of(query):
        _delta_kernel[call.query_tiles](*inputs, delta, *maps, post_query, statics[1], *rest, **constants)
        _query_gradient_kernel[(*call.query_tiles, call.slices(dim))](
            *inputs, delta, grad_query, *maps, pre_query, statics[0], *rest, **sliced
        )
        _value_gradient_kernel[(*call.key_tiles, call.slices(value_dim))](
            *inputs, grad_value, *maps, post_key, *rest, **sliced
        )
        _key_gradient_kernel[(*call.key_tiles, call.slices(dim))](
            *inputs, delta, grad_key, *maps, pre_key, *rest, **sliced
        )
    if shared:
        grad_key, grad_value = (
            x.unflatten(1, (key.shape[1], -1)).sum(2).to(query.dtype) for x in (grad_key, grad_value)
        )
    fixed = [None if x is None else x.sum((0, 1))[:heads, :heads] for x in statics]
    return (
        [grad_query, grad_key, grad_value],
        unpack(pre, pre_query, pre_key, fixed[0]),
        unpack(post, post_query, post_key, fixed[1]),
    )
