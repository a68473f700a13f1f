"""GELU of a 3x3 depthwise convolution on token grids, in one pass over memory each way.

What feed-forwards with a convolution inside (PVT v2, LITv2) do between their linear layers, on the widest tensors of
the network. The C++ kernel has a gradient; where it cannot serve (other devices and dtypes, export), it is the plain
torch operators of `reference.py`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.ops import _checks as check
from coterie.ops import _cpp
from coterie.ops._dispatch import Backend, Call, Operation, register
from coterie.ops._state import autocasting, exporting
from coterie.ops.depthwise_gelu import reference
from coterie.ops.depthwise_gelu.register import SOURCE, DepthwiseGelu


def depthwise_gelu(
    x: Float[Tensor, "batch height width dim"],
    weight: Float[Tensor, "dim 1 3 3"],
    bias: Float[Tensor, " dim"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "batch height width dim"]:
    """GELU(conv3x3(x) + bias), one group per channel and zeros around x.

    Args:
        x: (batch, height, width, dim).
        weight: (dim, 1, 3, 3), the depthwise convolution's.
        bias: (dim,).
        backend: "auto", "cpu" (C++, float32) or "reference".

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    op = "depthwise_gelu"
    check.check_tensor(op, "x", x, "batch height width dim")
    dim = x.shape[3]
    check.check_tensor(op, "weight", weight, "dim 1 3 3")
    check.check_same(op, "shape", "(dim, 1, 3, 3) and weight", (dim, 1, 3, 3), tuple(weight.shape))
    check.check_tensor(op, "bias", bias, "dim")
    check.check_same(op, "dim", "x and bias", dim, bias.shape[0])
    for name, value in (("weight", weight), ("bias", bias)):
        check.check_same(op, "device", f"x and {name}", x.device, value.device)
        if not autocasting(x.device.type):
            check.check_same(op, "dtype", f"x and {name}", x.dtype, value.dtype)
    call = _describe(x, weight, bias)
    if _OPERATION.choose(backend, call) == "reference":
        return reference.depthwise_gelu(x, weight, bias)
    if call.needs_grad:
        return DepthwiseGelu.apply(x, weight, bias)
    return torch.ops.coterie.depthwise_gelu(x, weight, bias)


def _describe(x: Tensor, *others: Tensor, **_: Any) -> Call:
    return Call(
        device=x.device.type,
        dtype=next((t.dtype for t in others if t.dtype != x.dtype), x.dtype),  # they differ under autocast only
        head_dim=x.shape[-1],
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)),
        exporting=exporting() or autocasting(x.device.type),
    )


def _cpu_refusal(call: Call) -> str | None:
    if call.exporting:
        return "an exported program, and autocast, take torch operators only"
    if call.device != "cpu" or call.dtype != torch.float32:
        return f"it takes float32 on the CPU, got {call.dtype} on {call.device}"
    if call.head_dim % 16:
        return f"it takes a multiple of 16 channels, got {call.head_dim}"
    return _kernel_refusal()


def _kernel_refusal() -> str | None:
    return _cpp.refusal(SOURCE)


# What torch.compiler.assume_constant_result does; calling that at import would load the compiler, and triton with it.
_kernel_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]

_BACKENDS = (
    Backend("cpu", "C++ kernels, one pass over memory each way, compiled on first use", _cpu_refusal),
    Backend("reference", "torch operators", lambda call: None),
)
_OPERATION = register(Operation("depthwise_gelu", _BACKENDS, _describe))
