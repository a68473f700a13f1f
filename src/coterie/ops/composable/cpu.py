"""Calls of the C++ kernels in `cpu_kernels.cpp`: memory and strides in, an error code out."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from coterie.ops import _cpp
from coterie.ops._dispatch import Call
from coterie.ops.composable.maps import HeadComposition
from coterie.ops.composable.packing import even_rank
from coterie.ops.composable.packing import pack as pack_maps
from coterie.ops.composable.packing import unpack as unpack_maps

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


def _tiled(x: Tensor | None) -> Tensor | None:
    """(batch, keys, rows, heads) as (batch, tiles, rows * heads, TILE)."""
    if x is None:
        return None
    x = pad(x.flatten(2), (0, 0, 0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE)).transpose(2, 3)
    return x.contiguous()


def _untiled(x: Tensor | None, keys: int, heads: int) -> Tensor | None:
    """(batch, tiles, rows * heads, TILE) as (batch, keys, rows, heads)."""
    return None if x is None else x.transpose(2, 3).flatten(1, 2)[:, :keys].unflatten(2, (-1, heads))


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
        self.maps: list[Tensor | None] = []
        for maps in (pre, post):
            query_side, key_side, static = pack_maps(maps, self.wide)
            self.maps += [query_side, _tiled(key_side), static]
        self.mask = None
        if attn_mask is not None:
            pairs = (query.shape[0], 1, query.shape[2], key.shape[2])
            self.mask = attn_mask.expand(pairs)[:, 0].view(torch.uint8)
        batch, heads, queries, head_dim = query.shape
        ranks = [even_rank(x) for maps in (pre, post) for x in (maps.query_in, maps.key_in)]
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
    sides = [_untiled(x, key.shape[2], query.shape[1]) if i % 3 == 1 else x for i, x in enumerate(slopes)]
    return results, unpack_maps(pre, *sides[:3]), unpack_maps(post, *sides[3:])
