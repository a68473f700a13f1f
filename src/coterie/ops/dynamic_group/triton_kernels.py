"""Attention over given groups on a GPU, forward and backward, in Triton.

Group sizes vary widely, so nothing is padded to the largest group. Queries are sorted by (batch, head, group); the
sorted run of one such *segment* is cut into pieces of a fixed number of queries, and a program takes a piece. The host
never waits for the sizes: piece p of segment s gets the slot `start_s // size + s + p`. Segments cannot share a slot,
since one of n queries has at most `(start_s + n) // size - start_s // size + 1` pieces, and there are
`queries // size + segments` slots in all, known from the shapes. The program of a slot without queries ends at once.

    forward   gathers a tile of queries of one group and walks over the group's keys in blocks, online softmax
    dq        the same tiles; also leaves delta_i = <dO_i, O_i> for the next kernel
    dk, dv    gathers a block of one group's keys and walks over a longer piece of the group's queries, with the sums in
              registers; writes partial sums (slots, selected, head_dim + value_dim). A giant group is many programs
    reduce    every key adds up its partial sums, which it finds by sorting `selected`

No atomics: each sum has one order, so that results are the same bits every time. The price is a sort of the entries of
`selected`, few beside the queries, and partial sums of at most a quarter as many rows as there are queries, plus one
list a group. Atomic additions would save both, but all groups like the same few large keys, and there atomics queue.

Products of float32 are exact ("ieee") and sums are float32. Scores stay in natural units: exp2 of scores times log2 e
would save a multiplication, but the rounding of the log-sum-exp in other units doubles the error of float32 gradients.
Keys that are masked, or outside [0, keys) as the -1 of a padded list, count as absent; a query without keys gets zeros
and a log-sum-exp of -inf. Block sizes come from `choose_blocks`, by rule and not by trial, so that results do not
depend on a measurement. The tiling follows FlashAttention-2 (arXiv 2307.08691).
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float, Int
from torch import Tensor

FUSED = {"enable_fp_fusion": True}  # multiply-adds in one instruction, also where Triton no longer does so by itself
REDUCED, REDUCE_STEP = 256, 8  # numbers of dk that a program of the reduction sums up, partial sums it loads at once


# Sizes that change from image to image: no kernel is compiled anew because one of them is 1 or a multiple of 16.
_SIZES = ("heads", "groups", "queries", "keys", "count", "total", "segments", "entries", "all_keys")


def _kernel(function: Callable[..., None]) -> Any:
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[name for name in _SIZES if name in names])


# -------------------------------------------------------------------------------- planning
@triton.jit
def _lower_bound(ordered, target, total):
    """How many of the `total` sorted numbers are smaller than `target`."""
    low = tl.full((), 0, tl.int64)
    high = low + total
    while low < high:
        middle = (low + high) // 2
        smaller = tl.load(ordered + middle) < target
        low = tl.where(smaller, middle + 1, low)
        high = tl.where(smaller, high, middle)
    return low


@_kernel
def _plan_kernel(ordered, starts, slot_segment, total, segments, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Where a segment starts among the sorted queries, and which slots are its own."""
    segment = tl.program_id(0)
    first = _lower_bound(ordered, segment, total)
    last = _lower_bound(ordered, segment + 1, total)
    tl.store(starts + segment, first)
    if segment == segments - 1:
        tl.store(starts + segments, last)
    end = last // SIZE + segment + 1
    for slot in range(first // SIZE + segment, end, BLOCK):
        place = slot + tl.arange(0, BLOCK)
        tl.store(slot_segment + place, segment, mask=place < end)


@triton.jit
def _piece(slot_segment, starts, slot, SIZE: tl.constexpr):
    """The segment of a slot and its range among the sorted queries; empty (begin >= end) for a surplus slot."""
    segment = tl.load(slot_segment + slot).to(tl.int64)
    first = tl.load(starts + segment)
    begin = first + (slot - (first // SIZE + segment)) * SIZE
    return segment, begin, tl.minimum(begin + SIZE, tl.load(starts + segment + 1))


# -------------------------------------------------------------------------------- gathering
@triton.jit
def _queries(order, begin, end, lane, queries, BLOCK: tl.constexpr):
    """Numbers of the sorted queries from `begin` on, over all heads and within theirs, and which of them exist."""
    place = begin + tl.arange(0, BLOCK)
    flat = tl.load(order + place, mask=place < end, other=-1)
    token = flat - lane * queries
    return flat, token, (place < end) & (token >= 0) & (token < queries)


@triton.jit
def _keys(selected, key_mask, segment, batch, block, count, keys, BLOCK: tl.constexpr):
    """Key numbers of a block of the group's list, and which of them may be attended to."""
    place = block + tl.arange(0, BLOCK)
    index = tl.load(selected + segment * count + place, mask=place < count, other=-1)
    valid = (index >= 0) & (index < keys)
    if key_mask is not None:
        valid = valid & (tl.load(key_mask + batch * keys + index, mask=valid, other=0) != 0)
    return index, valid


@triton.jit
def _rows(base, row, valid, row_stride, dim_stride, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (rows, BLOCK) of a matrix at 64-bit row numbers; zeros where not valid and beyond DIM."""
    dim = tl.arange(0, BLOCK)
    pointers = base + row[:, None] * row_stride + dim.to(tl.int64)[None, :] * dim_stride
    return tl.load(pointers, mask=valid[:, None] & (dim < DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(base, row, valid, x, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Write rows of a contiguous (rows, DIM) matrix, in its dtype."""
    dim = tl.arange(0, BLOCK)
    pointers = base + row[:, None] * DIM + dim[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None] & (dim < DIM)[None, :])


# -------------------------------------------------------------------------------- kernels
@_kernel
def _forward_kernel(
    query, key, value, output, logsumexp, order, starts, slot_segment, selected, key_mask,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    heads, groups, queries, keys, count, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    segment, begin, end = _piece(slot_segment, starts, tl.program_id(0), TILE)
    if begin >= end:
        return
    lane = segment // groups
    batch, head = lane // heads, lane % heads
    flat, token, exists = _queries(order, begin, end, lane, queries, TILE)
    q = _rows(query + batch * q_batch + head * q_head, token, exists, q_token, q_dim, HEAD_DIM, BLOCK_D)
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head

    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    mean = tl.zeros((TILE, BLOCK_V), tl.float32)
    for block in range(0, count, BLOCK_N):
        index, valid = _keys(selected, key_mask, segment, batch, block, count, keys, BLOCK_N)
        k = _rows(key, index, valid, k_token, k_dim, HEAD_DIM, BLOCK_D)
        v = _rows(value, index, valid, v_token, v_dim, VALUE_DIM, BLOCK_V)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(valid[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far: -inf - 0, as -inf - -inf is NaN
        weight = tl.exp(score - shift[:, None])
        decay = tl.exp(top - shift)
        total = total * decay + tl.sum(weight, 1)
        mean = tl.dot(weight.to(v.dtype), v, mean * decay[:, None], input_precision="ieee")
        top = higher

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    _store_rows(output, flat, exists, mean / total[:, None], VALUE_DIM, BLOCK_V)
    tl.store(logsumexp + flat, tl.where(empty, float("-inf"), top + tl.log(total)), mask=exists)


@_kernel
def _query_gradient_kernel(
    grad, query, key, value, output, logsumexp, delta, grad_query, order, starts, slot_segment, selected, key_mask,
    g_batch, g_head, g_token, g_dim, q_batch, q_head, q_token, q_dim,
    k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    heads, groups, queries, keys, count, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    segment, begin, end = _piece(slot_segment, starts, tl.program_id(0), TILE)
    if begin >= end:
        return
    lane = segment // groups
    batch, head = lane // heads, lane % heads
    flat, token, exists = _queries(order, begin, end, lane, queries, TILE)
    q = _rows(query + batch * q_batch + head * q_head, token, exists, q_token, q_dim, HEAD_DIM, BLOCK_D)
    g = _rows(grad + batch * g_batch + head * g_head, token, exists, g_token, g_dim, VALUE_DIM, BLOCK_V)
    y = _rows(output, flat, exists, VALUE_DIM, 1, VALUE_DIM, BLOCK_V)
    d = tl.sum(g.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + flat, d, mask=exists)
    norm = tl.load(logsumexp + flat, mask=exists, other=0.0)
    key += batch * k_batch + head * k_head
    value += batch * v_batch + head * v_head

    dq = tl.zeros((TILE, BLOCK_D), tl.float32)
    for block in range(0, count, BLOCK_N):
        index, valid = _keys(selected, key_mask, segment, batch, block, count, keys, BLOCK_N)
        k = _rows(key, index, valid, k_token, k_dim, HEAD_DIM, BLOCK_D)
        v = _rows(value, index, valid, v_token, v_dim, VALUE_DIM, BLOCK_V)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        weight = tl.exp(tl.where(valid[None, :], score - norm[:, None], float("-inf")))
        dweight = tl.dot(g, tl.trans(v), input_precision="ieee")
        dscore = weight * (dweight - d[:, None])
        dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision="ieee")
    _store_rows(grad_query, flat, exists, dq * scale, HEAD_DIM, BLOCK_D)


@_kernel
def _key_gradient_kernel(
    grad, query, key, value, logsumexp, delta, partial, order, starts, slot_segment, selected, key_mask,
    g_batch, g_head, g_token, g_dim, q_batch, q_head, q_token, q_dim,
    k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    heads, groups, queries, keys, count, scale,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(count, BLOCK_N)
    slot = tl.program_id(0) // blocks  # the blocks of one piece run side by side and share its queries in the L2 cache
    block = tl.program_id(0) % blocks * BLOCK_N
    segment, begin, end = _piece(slot_segment, starts, slot, PIECE)
    if begin >= end:
        return
    lane = segment // groups
    batch, head = lane // heads, lane % heads
    index, valid = _keys(selected, key_mask, segment, batch, block, count, keys, BLOCK_N)
    k = _rows(key + batch * k_batch + head * k_head, index, valid, k_token, k_dim, HEAD_DIM, BLOCK_D)
    v = _rows(value + batch * v_batch + head * v_head, index, valid, v_token, v_dim, VALUE_DIM, BLOCK_V)
    query += batch * q_batch + head * q_head
    grad += batch * g_batch + head * g_head

    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for place in range(begin, end, BLOCK_M):
        flat, token, exists = _queries(order, place, end, lane, queries, BLOCK_M)
        q = _rows(query, token, exists, q_token, q_dim, HEAD_DIM, BLOCK_D)
        g = _rows(grad, token, exists, g_token, g_dim, VALUE_DIM, BLOCK_V)
        norm = tl.load(logsumexp + flat, mask=exists, other=0.0)
        d = tl.load(delta + flat, mask=exists, other=0.0)
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        allowed = valid[:, None] & exists[None, :]
        weight = tl.exp(tl.where(allowed, score - norm[None, :], float("-inf")))
        dv = tl.dot(weight.to(g.dtype), g, dv, input_precision="ieee")
        dweight = tl.dot(v, tl.trans(g), input_precision="ieee")
        dscore = weight * (dweight - d[None, :])
        dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision="ieee")

    place = block + tl.arange(0, BLOCK_N)
    partial += (slot.to(tl.int64) * count + place)[:, None] * (HEAD_DIM + VALUE_DIM)
    dim, value_dim = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_V)[None, :]
    tl.store(partial + dim, dk * scale, mask=(place < count)[:, None] & (dim < HEAD_DIM))
    tl.store(partial + HEAD_DIM + value_dim, dv, mask=(place < count)[:, None] & (value_dim < VALUE_DIM))


@_kernel
def _reduce_kernel(
    sorted_key, entry, starts, partial, grad_key, grad_value, entries, all_keys, count,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PIECE: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Entries (places of `selected`) sorted by key: the first one of a key adds up the partial sums of them all."""
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(sorted_key + place, mask=place < entries, other=all_keys).to(tl.int64)
    before = tl.load(sorted_key + place - 1, mask=(place > 0) & (place < entries), other=-1)
    leads = (row != before) & (row < all_keys)
    width: tl.constexpr = HEAD_DIM + VALUE_DIM
    dim, value_dim = tl.arange(0, BLOCK_D)[None, None, :], tl.arange(0, BLOCK_V)[None, None, :]
    dk = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dv = tl.zeros((ROWS, BLOCK_V), tl.float32)
    ahead = place[:, None] + tl.arange(0, STEP)[None, :]
    going = tl.max(leads.to(tl.int32), 0)
    while going > 0:
        same = tl.load(sorted_key + ahead, mask=ahead < entries, other=-1) == row[:, None]
        same = same & leads[:, None]
        place_of = tl.load(entry + ahead, mask=same, other=0)
        segment = place_of // count
        first = tl.load(starts + segment, mask=same, other=0)
        pieces = (tl.load(starts + segment + 1, mask=same, other=0) - first + PIECE - 1) // PIECE
        source = (first // PIECE + segment) * count + place_of % count
        for piece in range(0, tl.max(tl.max(pieces, 1), 0)):
            exists = (same & (piece < pieces))[:, :, None]
            pointers = partial + ((source + piece * count) * width)[:, :, None]
            dk += tl.sum(tl.load(pointers + dim, mask=exists & (dim < HEAD_DIM), other=0.0), 1)
            dv += tl.sum(tl.load(pointers + HEAD_DIM + value_dim, mask=exists & (value_dim < VALUE_DIM), other=0.0), 1)
        ahead += STEP
        going = tl.max(tl.max(same.to(tl.int32), 1), 0)
    _store_rows(grad_key, row, leads, dk, HEAD_DIM, BLOCK_D)
    _store_rows(grad_value, row, leads, dv, VALUE_DIM, BLOCK_V)


# -------------------------------------------------------------------------------- host
class Blocks(NamedTuple):
    """Sizes of a program's work. It takes `keys` at a time; in the forward and dq a `tile` of queries with `warps`, in
    dk and dv a `piece` of queries, `step` of them at a time, with `step_warps`."""

    keys: int
    tile: int
    warps: int
    piece: int
    step: int
    step_warps: int


def choose_blocks(mean_group: float, count: int, dim: int, itemsize: int) -> Blocks:
    """Blocks for groups of `mean_group` queries and `count` keys, rows padded to `dim` elements of `itemsize` bytes.

    A tile is at most a quarter of a mean group, so that half-empty last tiles cost little, and at least 16, the least
    of tensor cores. Blocks shrink as rows grow, to stay within 255 registers a thread on sm_90 and to let two or three
    programs share a multiprocessor, which hides the latency of gathered loads. Exact products of float32 run on
    ordinary cores and unroll fully, hence small blocks. A piece is at least four times as long as the list of keys, so
    that partial sums stay small beside the queries.
    """
    tile = next((size for size in (16, 32, 64) if mean_group < 8 * size), 128)
    keys = min(64, max(16, triton.next_power_of_2(count)))
    piece = max(512, triton.next_power_of_2(4 * count))
    if itemsize == 4:
        side = 32 if dim <= 64 else 16
        return Blocks(min(keys, side), min(tile, side), 4, piece, 16, 4)
    if dim <= 128:
        return Blocks(keys, tile, 8 if tile == 128 else 4, piece, min(tile, 32), 4 if dim <= 64 else 8)
    return Blocks(min(keys, 32), min(tile, 64), 8, piece, min(tile, 32), 8)


class Plan(NamedTuple):
    """`order` (batch * heads * queries) of the queries, `starts` (segments + 1), and the segment of each slot."""

    order: Tensor
    starts: Tensor
    slot_segment: Tensor


def _sort_queries(assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The sorted segment of every query, and the query it belongs to."""
    segments = assignment.shape[0] * assignment.shape[1] * groups
    narrow = torch.int16 if segments < 2**15 else torch.int32  # a radix sort takes time by the byte
    first = torch.arange(0, segments, groups, dtype=narrow, device=assignment.device)
    return (assignment.flatten(0, 1).to(narrow) + first.unsqueeze(1)).flatten().sort(stable=True)


def _plan(ordered: Tensor, order: Tensor, segments: int, size: int) -> Plan:
    total = ordered.numel()
    starts = order.new_empty(segments + 1)
    slot_segment = order.new_empty(total // size + segments, dtype=torch.int32)
    _plan_kernel[(segments,)](
        ordered, starts, slot_segment, total, segments, SIZE=size, BLOCK=128, num_warps=1, **FUSED
    )
    return Plan(order, starts, slot_segment)


def _common(query: Tensor, value: Tensor, selected: Tensor) -> tuple[dict[str, int], Blocks]:
    """Compile-time dimensions and block sizes of a call."""
    head_dim, value_dim = query.shape[3], value.shape[3]
    block_d, block_v = (max(16, triton.next_power_of_2(n)) for n in (head_dim, value_dim))
    dims = {"HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d, "BLOCK_V": block_v}
    mean_group = query.shape[2] / selected.shape[2]
    return dims, choose_blocks(mean_group, selected.shape[3], max(block_d, block_v), query.element_size())


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'; in the interpreter there is none."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _indices(assignment: Tensor, selected: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    return assignment.contiguous(), selected.contiguous(), mask


def forward(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    assignment: Int[Tensor, "batch heads queries"],
    selected: Int[Tensor, "batch heads groups selected"],
    key_mask: Bool[Tensor, "batch keys"] | None,
    scale: float,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Output, and the log-sum-exp of every query in float32. Any strides; `selected` may be padded with -1.

    Nothing is checked here, as a look at the data would make the host wait: a query whose assignment lies outside
    [0, groups) gets an arbitrary row (no memory outside the tensors is touched).
    """
    batch, heads, queries, _ = query.shape
    groups, count = selected.shape[2:]
    assignment, selected, key_mask = _indices(assignment, selected, key_mask)
    dims, blocks = _common(query, value, selected)
    output = query.new_empty((batch, heads, queries, value.shape[3]))
    logsumexp = query.new_empty((batch, heads, queries), dtype=torch.float32)
    with _on_device_of(query):
        plan = _plan(*_sort_queries(assignment, groups), batch * heads * groups, blocks.tile)
        _forward_kernel[(plan.slot_segment.numel(),)](
            query, key, value, output, logsumexp, *plan, selected, key_mask,
            *query.stride(), *key.stride(), *value.stride(),
            heads, groups, queries, key.shape[2], count, scale,
            **dims, TILE=blocks.tile, BLOCK_N=blocks.keys, num_warps=blocks.warps, num_stages=2, **FUSED,
        )  # fmt: skip
    return output, logsumexp


def backward(
    grad: Float[Tensor, "batch heads queries value_dim"],
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    assignment: Int[Tensor, "batch heads queries"],
    selected: Int[Tensor, "batch heads groups selected"],
    key_mask: Bool[Tensor, "batch keys"] | None,
    output: Float[Tensor, "batch heads queries value_dim"],
    logsumexp: Float[Tensor, "batch heads queries"],
    scale: float,
) -> tuple[
    Float[Tensor, "batch heads queries head_dim"],
    Float[Tensor, "batch heads keys head_dim"],
    Float[Tensor, "batch heads keys value_dim"],
]:
    """Gradients of query, key and value, in their dtypes; sums are float32 and in a fixed order."""
    batch, heads, queries, head_dim = query.shape
    keys, value_dim = value.shape[2:]
    groups, count = selected.shape[2:]
    segments = batch * heads * groups
    assignment, selected, key_mask = _indices(assignment, selected, key_mask)
    output, logsumexp = output.contiguous(), logsumexp.contiguous()
    dims, blocks = _common(query, value, selected)
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = key.new_zeros(key.shape), value.new_zeros(value.shape)
    delta = torch.empty_like(logsumexp)
    strides = (*grad.stride(), *query.stride(), *key.stride(), *value.stride())
    sizes = (heads, groups, queries, keys, count, scale)
    with _on_device_of(query):
        ordered, order = _sort_queries(assignment, groups)
        tiles = _plan(ordered, order, segments, blocks.tile)
        _query_gradient_kernel[(tiles.slot_segment.numel(),)](
            grad, query, key, value, output, logsumexp, delta, grad_query, *tiles, selected, key_mask, *strides, *sizes,
            **dims, TILE=blocks.tile, BLOCK_N=blocks.keys, num_warps=blocks.warps, num_stages=2, **FUSED,
        )  # fmt: skip

        pieces = _plan(ordered, order, segments, blocks.piece)
        slots = pieces.slot_segment.numel()
        partial = query.new_empty((slots, count, head_dim + value_dim), dtype=torch.float32)
        _key_gradient_kernel[(slots * triton.cdiv(count, blocks.keys),)](
            grad, query, key, value, logsumexp, delta, partial, *pieces, selected, key_mask, *strides, *sizes,
            **dims, PIECE=blocks.piece, BLOCK_M=blocks.step, BLOCK_N=blocks.keys,
            num_warps=blocks.step_warps, num_stages=2, **FUSED,
        )  # fmt: skip

        sorted_key, entry = _sort_entries(selected, keys)
        rows = max(1, REDUCED // max(dims["BLOCK_D"], dims["BLOCK_V"]))
        _reduce_kernel[(triton.cdiv(entry.numel(), rows),)](
            sorted_key, entry, pieces.starts, partial, grad_key, grad_value, entry.numel(), batch * heads * keys, count,
            **dims, PIECE=blocks.piece, ROWS=rows, STEP=REDUCE_STEP, **FUSED,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _sort_entries(selected: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Row numbers (batch * heads * keys) of the entries of `selected`, sorted; absent keys last. And those entries."""
    lanes = selected.shape[0] * selected.shape[1]
    narrow = torch.int32 if lanes * keys < 2**31 else torch.int64
    first = torch.arange(0, lanes * keys, keys, dtype=narrow, device=selected.device)
    index = selected.reshape(lanes, -1).to(narrow)
    row = torch.where((index >= 0) & (index < keys), index + first.unsqueeze(1), lanes * keys)
    return row.flatten().sort(stable=True)
