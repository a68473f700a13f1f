"""Calls of the C++ kernels in `cpu_kernels.cpp`: memory and strides in, an error code out."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from coterie.ops import _cpp
from coterie.ops._dispatch import Call

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
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


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _run(kernel: str, *arguments: object) -> None:
    library = _cpp.load(SOURCE)
    assert library is not None, "refusal() has been asked before"
    error = getattr(library, kernel)(*arguments, ctypes.c_int(torch.get_num_threads()))
    if error == 1:
        raise ValueError("grouped_attention: assignment must lie in [0, groups); it holds a value outside")
    if error == 2:
        raise ValueError("grouped_attention: selected must lie in [0, keys); it holds a value outside")
    if error:
        raise MemoryError(f"{kernel}: out of memory")


def _sizes(query: Tensor, key: Tensor, value_dim: int, groups: int, selected: int) -> ctypes.Array:
    batch, heads, queries, head_dim = query.shape
    return (ctypes.c_int64 * 8)(batch, heads, queries, key.shape[2], head_dim, value_dim, groups, selected)


def _strides(*tensors: Tensor) -> ctypes.Array:
    flat = [stride for x in tensors for stride in x.stride()[:3]]
    return (ctypes.c_int64 * 12)(*flat)


def _rows(x: Tensor) -> Tensor:
    """Any strides will do, but the elements of a token lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def dynamic_groups(
    query: Tensor,
    key: Tensor,
    closeness: Tensor,
    bias: Tensor,
    direction: Tensor,
    top_k: int,
    key_mask: Tensor | None,
    normalize_keys: bool,
) -> tuple[Tensor, Tensor]:
    """argmax over groups of <q, closeness> + bias, and the top-k keys by <k, direction>; weights are float32,
    contiguous."""
    query, key, mask = _rows(query), _rows(key), _bytes(key_mask)
    groups = direction.shape[1]
    assignment = torch.empty(query.shape[:3], dtype=torch.int64)
    selected = torch.empty((*query.shape[:2], groups, top_k), dtype=torch.int64)
    name = str(query.dtype).removeprefix("torch.")
    _run(
        f"coterie_groups_{name}",
        _address(query),
        _address(key),
        _address(closeness),
        _address(bias),
        _address(direction),
        _address(mask),
        _address(assignment),
        _address(selected),
        _sizes(query, key, 0, groups, top_k),
        _strides(query, key),
        ctypes.c_int(normalize_keys),
    )
    return assignment, selected


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of every query (float32; float64 for float64)."""
    query, key, value, mask = _rows(query), _rows(key), _rows(value), _bytes(key_mask)
    assignment, selected = assignment.contiguous(), selected.contiguous()
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    logsumexp = query.new_empty(query.shape[:3], dtype=wide)
    name = str(query.dtype).removeprefix("torch.")
    _run(
        f"coterie_forward_{name}",
        _address(query),
        _address(key),
        _address(value),
        _address(assignment),
        _address(selected),
        _address(mask),
        _address(output),
        _address(logsumexp),
        _sizes(query, key, value.shape[3], *selected.shape[2:]),
        _strides(query, key, value),
        ctypes.c_double(scale),
    )
    return output, logsumexp


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    assignment: Tensor,
    selected: Tensor,
    key_mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grad, query, key, value, mask = _rows(grad), _rows(query), _rows(key), _rows(value), _bytes(key_mask)
    assignment, selected = assignment.contiguous(), selected.contiguous()
    output, logsumexp = output.contiguous(), logsumexp.contiguous()
    grad_query = query.new_empty(query.shape)
    grad_key = query.new_zeros(key.shape, dtype=logsumexp.dtype)
    grad_value = query.new_zeros(value.shape, dtype=logsumexp.dtype)
    name = str(query.dtype).removeprefix("torch.")
    _run(
        f"coterie_backward_{name}",
        _address(grad),
        _address(query),
        _address(key),
        _address(value),
        _address(assignment),
        _address(selected),
        _address(mask),
        _address(output),
        _address(logsumexp),
        _address(grad_query),
        _address(grad_key),
        _address(grad_value),
        _sizes(query, key, value.shape[3], *selected.shape[2:]),
        _strides(query, key, value, grad),
        ctypes.c_double(scale),
    )
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
