"""Calls of the C++ kernels in `cpu_kernels.cpp`: memory and strides in, an error code out."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from coterie.ops import _cpp
from coterie.ops._dispatch import Call
from coterie.ops.composable.maps import HeadComposition

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
TILE = 64  # TS in compose.h
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def refusal(call: Call) -> str | None:
    """Why the C++ kernels cannot serve a call, or None."""
    if call.device != "cpu":
        return f"it takes CPU tensors, got {call.device}"
    if call.dtype not in _DTYPES:
        return f"it takes float32, float64 and bfloat16, got {call.dtype}"
    return _kernel_refusal()


def _kernel_refusal() -> str | None:
    return _cpp.refusal(SOURCE)


# What torch.compiler.assume_constant_result does; calling that at import would load the compiler, and triton with it.
_kernel_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _run(kernel: str, *arguments: object) -> None:
    library = _cpp.load(SOURCE)
    assert library is not None, "refusal() has been asked before"
    if getattr(library, kernel)(*arguments, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError(f"{kernel}: out of memory")


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _rows(x: Tensor) -> Tensor:
    """Any strides will do, but the elements of a token lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


# ---------------------------------------------------------------------------- maps, as the kernels read them
def _even(x: Tensor) -> Tensor:
    """(batch, tokens, rank, heads) with one more rank of zeros if it is odd."""
    return pad(x, (0, 0, 0, 1)) if x.shape[2] % 2 else x


def _rank(x: Tensor | None) -> int:
    return 0 if x is None else x.shape[2] + x.shape[2] % 2


def _side(into: Tensor | None, out: Tensor | None, gate: Tensor | None, one: float, wide: torch.dtype) -> Tensor | None:
    """One side's maps as (batch, tokens, (2 rank + 1) heads): in, out, gate + one. Ranks are even."""
    ranks = [_even(x.to(wide)) for x in (into, out) if x is not None]
    if gate is not None:
        gate = gate.to(wide) + one
    elif ranks:
        gate = ranks[0].new_full((*ranks[0].shape[:2], ranks[0].shape[3]), one)
    else:
        return None
    return torch.cat([*(x.flatten(2) for x in ranks), gate], -1)


def _tiled(x: Tensor | None) -> Tensor | None:
    """(batch, keys, width) as (batch, tiles, width, TILE)."""
    if x is None:
        return None
    return pad(x, (0, 0, 0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE)).transpose(2, 3).contiguous()


def _packed(maps: HeadComposition, wide: torch.dtype) -> list[Tensor | None]:
    return [
        _side(maps.query_in, maps.query_out, maps.query_gate, 1.0, wide),
        _tiled(_side(maps.key_in, maps.key_out, maps.key_gate, 0.0, wide)),
        None if maps.static is None else maps.static.to(wide).contiguous(),
    ]


def _split(side: Tensor | None, into: Tensor | None, gate: Tensor | None) -> list[Tensor | None]:
    """The gradients of in, out and gate, out of one in the layout of `_side`; None for what was not given."""
    if side is None:
        return [None, None, None]
    rank, even = (0 if into is None else into.shape[2]), _rank(into)
    rows = side.unflatten(-1, (2 * even + 1, -1))
    parts = [None, None] if into is None else [rows[:, :, :rank], rows[:, :, even : even + rank]]
    return [*parts, None if gate is None else rows[:, :, -1]]


def _unpacked(slopes: list[Tensor | None], maps: HeadComposition, keys: int) -> list[Tensor | None]:
    """The gradients of the seven parts of `maps`, in their dtypes."""
    query, key, static = slopes
    if key is not None:
        key = key.transpose(2, 3).flatten(1, 2)[:, :keys]
    parts = [
        *_split(query, maps.query_in, maps.query_gate),
        *_split(key, maps.key_in, maps.key_gate),
        static,
    ]
    return [
        None if x is None or like is None else like.new_empty(like.shape).copy_(x)
        for x, like in zip(parts, maps, strict=True)
    ]


# ---------------------------------------------------------------------------- the two passes
class _Inputs:
    """The arguments of a call as memory; holds what the addresses point to."""

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
    ) -> None:
        self.tensors = [_rows(x) for x in (query, key, value)]
        self.wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.name = str(query.dtype).removeprefix("torch.")
        self.maps = [*_packed(pre, self.wide), *_packed(post, self.wide)]
        self.mask = None
        if attn_mask is not None:
            pairs = (query.shape[0], 1, query.shape[2], key.shape[2])
            self.mask = attn_mask.expand(pairs)[:, 0].view(torch.uint8)
        batch, heads, queries, head_dim = query.shape
        ranks = [_rank(x) for maps in (pre, post) for x in (maps.query_in, maps.key_in)]
        self.sizes = (ctypes.c_int64 * 14)(
            *(batch, heads, key.shape[1], queries, key.shape[2], head_dim, value.shape[3]),
            *(is_causal, window or 0, _block(query), *ranks),
        )

    def strides(self, *more: Tensor) -> ctypes.Array:
        """Of query, key, value, mask and `more`: three each."""
        mask = (0, 0, 0) if self.mask is None else self.mask.stride()
        first, rest = ([s for x in tensors for s in x.stride()[:3]] for tensors in (self.tensors, more))
        return (ctypes.c_int64 * 15)(*first, *mask, *rest)


def _block(query: Tensor) -> int:
    """Queries per block: all heads of a tile should lie in the second-level cache."""
    most = 48 if query.shape[1] <= 8 else 24
    return min(most, -(-query.shape[2] // 6) * 6)  # products take six rows at a time


def _pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(_address(x) for x in tensors))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre: HeadComposition,
    post: HeadComposition,
    is_causal: bool,
    window: int | None,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of every row of the composed scores (float32; float64 for float64)."""
    inputs = _Inputs(query, key, value, pre, post, is_causal, window, attn_mask)
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    logsumexp = query.new_empty(query.shape[:3], dtype=inputs.wide)
    _run(
        f"coterie_forward_{inputs.name}",
        *(_address(x) for x in inputs.tensors),
        _pointers(inputs.maps),
        _address(inputs.mask),
        _address(output),
        _address(logsumexp),
        inputs.sizes,
        inputs.strides(),
        ctypes.c_double(scale),
    )
    return output, logsumexp


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre: HeadComposition,
    post: HeadComposition,
    logsumexp: Tensor,
    is_causal: bool,
    window: int | None,
    attn_mask: Tensor | None,
    scale: float,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Gradients of query, key and value, of the parts of `pre`, and of the parts of `post`."""
    grad, logsumexp = _rows(grad), logsumexp.contiguous()
    inputs = _Inputs(query, key, value, pre, post, is_causal, window, attn_mask)
    results = [x.new_empty(x.shape) for x in (query, key, value)]
    slopes = [None if x is None else torch.zeros_like(x) for x in inputs.maps]
    _run(
        f"coterie_backward_{inputs.name}",
        _address(grad),
        *(_address(x) for x in inputs.tensors),
        _pointers(inputs.maps),
        _pointers(slopes),
        _address(inputs.mask),
        _address(logsumexp),
        *(_address(x) for x in results),
        inputs.sizes,
        inputs.strides(grad),
        ctypes.c_double(scale),
    )
    keys = key.shape[2]
    return results, _unpacked(slopes[:3], pre, keys), _unpacked(slopes[3:], post, keys)
