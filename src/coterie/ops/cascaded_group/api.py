"""Cascaded group attention: the heads of EfficientViT, each on its own channels plus what the head before gave.

EfficientViT (Microsoft), arXiv 2305.07027 (CVPR 2023), section 3.2. Inside each window, with x_1 ... x_h the channels
of x in equal parts:

    f_1 = x_1,  f_i = x_i + y_(i-1)                           q, k, v = W_i f_i + b_i,  q <- depth-wise convolution of q
    y_i = softmax(scale q k^T + bias of |offset|) v           y = (y_1, ..., y_h)

As operators this is a dozen small steps per head, and heads wait for each other; the C++ kernel keeps a window in the
first-level cache through all of them. Inference only: where a gradient is needed it is `reference.py`.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coterie.ops import _checks as check
from coterie.ops import _cpp
from coterie.ops._dispatch import Backend, Call, Operation, register
from coterie.ops._flops import register_flops
from coterie.ops._state import exporting
from coterie.ops.cascaded_group import reference

_OP = "cascaded_group_attention"
_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_LANES = 16


def cascaded_group_attention(
    x: Float[Tensor, "batch rows columns dim"],
    weight: Float[Tensor, "heads qkv_dim head_dim"],
    bias: Float[Tensor, "heads qkv_dim"],
    taps: Float[Tensor, "heads key_dim size size"],
    tap_bias: Float[Tensor, "heads key_dim"],
    table: Float[Tensor, "heads offsets"],
    *,
    window: tuple[int, int],
    mask: Bool[Tensor, "batch rows columns"] | None = None,
    outside: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch rows columns dim"]:
    """All heads of cascaded group attention, in windows of the grid, without the projection after them.

    Args:
        x: (batch, rows, columns, dim), any strides.
        weight, bias: (heads, 2 key_dim + head_dim, head_dim) and (heads, 2 key_dim + head_dim), of query, key, value;
            head_dim is dim / heads.
        taps, tap_bias: (heads, key_dim, size, size) and (heads, key_dim), the convolution of each head's query: one
            group per channel, an odd size, zeros around the window.
        table: (heads, side^2), the bias of the logit of two tokens by |row offset| side + |column offset|.
        window: rows and columns of a window, at most `side`.
        mask: (batch, rows, columns), True = a real token. Others are no keys, and zeros to the convolution.
        outside: whether zeros behind the last row and column, where windows do not divide the grid, take part.
        scale: of the logits; key_dim ** -0.5 if None.
        backend: "auto", "cpu" (C++, float32, no gradient) or "reference".

    Returns:
        (batch, rows, columns, dim). A token that may attend to nobody gets zeros.

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    check.check_tensor(_OP, "x", x, "batch rows columns dim")
    check.check_tensor(_OP, "weight", weight, "heads qkv_dim head_dim")
    check.check_tensor(_OP, "taps", taps, "heads key_dim size size")
    heads, key_dim, size = taps.shape[:3]
    head_dim = x.shape[3] // heads
    if size % 2 == 0:
        raise ValueError(f"{_OP}: taps must have an odd size, got {tuple(taps.shape)}")
    for name, value, shape in (
        ("weight", weight, (heads, 2 * key_dim + head_dim, head_dim)),
        ("bias", bias, (heads, 2 * key_dim + head_dim)),
        ("taps", taps, (heads, key_dim, size, size)),
        ("tap_bias", tap_bias, (heads, key_dim)),
    ):
        check.check_same(_OP, "shape", f"the expected and {name}", shape, tuple(value.shape))
        check.check_same(_OP, "device", f"x and {name}", x.device, value.device)
        check.check_same(_OP, "dtype", f"x and {name}", x.dtype, value.dtype)
    check.check_tensor(_OP, "table", table, "heads offsets")
    side = round(table.shape[1] ** 0.5)
    if table.shape[0] != heads or side * side != table.shape[1]:
        raise ValueError(f"{_OP}: table must be (heads={heads}, side^2), got {tuple(table.shape)}")
    if not 1 <= min(window) <= max(window) <= side:
        raise ValueError(f"{_OP}: window must be 1 to {side}, the side of the table, along each axis, got {window}")
    if mask is not None:
        check.check_key_mask(_OP, mask.flatten(1), x.shape[0], x.shape[1] * x.shape[2], x.device)
    check.check_scale(_OP, scale)
    scale = key_dim**-0.5 if scale is None else float(scale)
    tensors = (x, weight, bias, taps, tap_bias, table)
    if _OPERATION.choose(backend, _describe(*tensors)) == "reference":
        return reference.cascaded_group_attention(*tensors, mask, window, outside, scale)
    return torch.ops.coterie.cascaded_group_attention(*tensors, mask, list(window), outside, scale)


def _describe(x: Tensor, weight: Tensor, bias: Tensor, taps: Tensor, *others: Tensor, **_: Any) -> Call:
    widths = (taps.shape[1], x.shape[3] // taps.shape[0])
    return Call(
        device=x.device.type,
        dtype=x.dtype,
        head_dim=next((width for width in widths if width % _LANES), widths[0]),
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias, taps, *others)),
        exporting=exporting(),
    )


def _cpu_refusal(call: Call) -> str | None:
    if call.exporting:
        return "an exported program holds torch operators only, so that it runs without coterie"
    if call.device != "cpu" or call.dtype != torch.float32:
        return f"it takes float32 on the CPU, got {call.dtype} on {call.device}"
    if call.needs_grad:
        return "it has no gradient, and one is needed"
    if call.head_dim % _LANES:
        return f"it takes multiples of {_LANES} channels of a head's query and value, got {call.head_dim}"
    return _kernel_refusal()


def _kernel_refusal() -> str | None:
    return _cpp.refusal(_SOURCE)


# What torch.compiler.assume_constant_result does; calling that at import would load the compiler, and triton with it.
_kernel_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]

_BACKENDS = (
    Backend("cpu", "C++ kernel, a window at a time, compiled on first use", _cpu_refusal),
    Backend("reference", "torch operators", lambda call: None),
)
_OPERATION = register(Operation(_OP, _BACKENDS, _describe))

_library = torch.library.Library("coterie", "FRAGMENT")
_library.define(
    "cascaded_group_attention(Tensor x, Tensor weight, Tensor bias, Tensor taps, Tensor tap_bias, Tensor table, "
    "Tensor? mask, int[] window, bool outside, float scale) -> Tensor"
)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    taps: Tensor,
    tap_bias: Tensor,
    table: Tensor,
    mask: Tensor | None,
    window: list[int],
    outside: bool,
    scale: float,
) -> Tensor:
    library = _cpp.load(_SOURCE)
    assert library is not None, "the refusal has been asked before"
    heads, key_dim, size = taps.shape[:3]
    columns = weight.transpose(1, 2).contiguous()
    taps = taps.flatten(2).transpose(1, 2).contiguous()
    bias, tap_bias, table = bias.contiguous(), tap_bias.contiguous(), table.contiguous()
    real = None if mask is None else mask.contiguous().view(torch.uint8)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    side = round(table.shape[1] ** 0.5)
    sizes = (*x.shape[:3], heads, key_dim, x.shape[3] // heads, *window, side, size)
    tensors = (x, columns, bias, taps, tap_bias, table, real, y)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    numbers = ((ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * 4)(*x.stride()), ctypes.c_float(scale))
    if library.coterie_cascaded_group(
        *pointers, *numbers, ctypes.c_int(outside), ctypes.c_int(torch.get_num_threads())
    ):
        raise MemoryError(f"{_OP}: out of memory")
    return y


_library.impl("cascaded_group_attention", _run, "CPU")


@torch.library.register_fake("coterie::cascaded_group_attention", lib=_library)
def _(x, weight, bias, taps, tap_bias, table, mask, window, outside, scale):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flops(x_shape, weight_shape, bias_shape, taps_shape, *others: Any, **_: Any) -> int:
    batch, rows, columns, dim = x_shape
    heads, key_dim, size = taps_shape[:3]
    window = others[3]
    windows = -(-rows // window[0]) * -(-columns // window[1])
    tokens = batch * windows * window[0] * window[1]
    per_head = weight_shape[1] * weight_shape[2] + key_dim * size**2
    return 2 * tokens * heads * (per_head + window[0] * window[1] * (key_dim + dim // heads))


register_flops(torch.ops.coterie.cascaded_group_attention, _flops)
