"""GELU, scale and shift, identity plus depthwise convolution, GELU, in one pass: what an IRFFN does between its
linear layers.

Five passes over the widest tensor of the network become one. Inference only: where a gradient is needed, and wherever
the C++ kernel
cannot serve (other devices and dtypes, export), it is the plain torch operators of `reference.py`.
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.ops import _checks as check
from coterie.ops import _cpp
from coterie.ops._dispatch import Backend, Call, Operation, register
from coterie.ops._flops import register_flops
from coterie.ops._state import exporting
from coterie.ops.gelu_depthwise import reference

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")


def gelu_depthwise(
    x: Float[Tensor, "batch height width dim"],
    scale: Float[Tensor, " dim"],
    shift: Float[Tensor, " dim"],
    weight: Float[Tensor, "dim 1 3 3"],
    bias: Float[Tensor, " dim"],
    *,
    offset: Float[Tensor, " dim"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch height width dim"]:
    """u = GELU(x + offset) scale + shift; then GELU(u + conv3x3(u) + bias), one group per channel and zeros around u.

    The middle of CMT's inverted residual feed-forward (arXiv 2107.06263) with its first batch normalisation as
    `scale` and `shift`.

    Args:
        x: (batch, height, width, dim).
        scale, shift, bias: (dim,).
        weight: (dim, 1, 3, 3), the depthwise convolution's.
        offset: (dim,), zeros if None: the bias of the linear layer before, which would else be a pass of its own.
        backend: "auto", "cpu" (C++, float32, no gradient) or "reference".

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    op = "gelu_depthwise"
    check.check_tensor(op, "x", x, "batch height width dim")
    dim = x.shape[3]
    if offset is None:
        offset = torch.zeros_like(bias)
    for name, value in (("scale", scale), ("shift", shift), ("bias", bias), ("offset", offset)):
        check.check_tensor(op, name, value, "dim")
        check.check_same(op, "dim", f"x and {name}", dim, value.shape[0])
    check.check_tensor(op, "weight", weight, "dim 1 3 3")
    check.check_same(op, "shape", "(dim, 1, 3, 3) and weight", (dim, 1, 3, 3), tuple(weight.shape))
    for name, value in (
        ("scale", scale), ("shift", shift), ("weight", weight), ("bias", bias), ("offset", offset)
    ):  # fmt: skip
        check.check_same(op, "device", f"x and {name}", x.device, value.device)
        check.check_same(op, "dtype", f"x and {name}", x.dtype, value.dtype)
    arguments = (x, offset, scale, shift, weight, bias)
    if _OPERATION.choose(backend, _describe(*arguments)) == "reference":
        return reference.gelu_depthwise(*arguments)
    return torch.ops.coterie.gelu_depthwise(*arguments)


def gelu_affine(
    x: Float[Tensor, "batch height width dim"],
    scale: Float[Tensor, " dim"],
    shift: Float[Tensor, " dim"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "batch height width dim"]:
    """GELU(x) scale + shift in one pass: GELU and the batch normalisation after it, in inference.

    Args:
        x: (batch, height, width, dim).
        scale, shift: (dim,).
        backend: as in `gelu_depthwise`.

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    op = "gelu_affine"
    check.check_tensor(op, "x", x, "batch height width dim")
    for name, value in (("scale", scale), ("shift", shift)):
        check.check_tensor(op, name, value, "dim")
        check.check_same(op, "dim", f"x and {name}", x.shape[3], value.shape[0])
        check.check_same(op, "device", f"x and {name}", x.device, value.device)
        check.check_same(op, "dtype", f"x and {name}", x.dtype, value.dtype)
    if _AFFINE.choose(backend, _describe(x, scale, shift)) == "reference":
        return reference.gelu_affine(x, scale, shift)
    return torch.ops.coterie.gelu_affine(x, scale, shift)


def _describe(x: Tensor, *others: Tensor, **_: Any) -> Call:
    return Call(
        device=x.device.type,
        dtype=x.dtype,
        head_dim=x.shape[-1],
        needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)),
        exporting=exporting(),
    )


def _cpu_refusal(call: Call) -> str | None:
    if call.exporting:
        return "an exported program holds torch operators only, so that it runs without coterie"
    if call.device != "cpu" or call.dtype != torch.float32:
        return f"it takes float32 on the CPU, got {call.dtype} on {call.device}"
    if call.needs_grad:
        return "it has no gradient, and one is needed"
    if call.head_dim % 16:
        return f"it takes a multiple of 16 channels, got {call.head_dim}"
    return _kernel_refusal()


def _kernel_refusal() -> str | None:
    return _cpp.refusal(_SOURCE)


# What torch.compiler.assume_constant_result does; calling that at import would load the compiler, and triton with it.
_kernel_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]

_BACKENDS = (
    Backend("cpu", "C++ kernel, one pass over memory, compiled on first use", _cpu_refusal),
    Backend("reference", "torch operators", lambda call: None),
)
_OPERATION = register(Operation("gelu_depthwise", _BACKENDS, _describe))
_AFFINE = register(Operation("gelu_affine", _BACKENDS, _describe))

_library = torch.library.Library("coterie", "FRAGMENT")
_library.define(
    "gelu_depthwise(Tensor x, Tensor offset, Tensor scale, Tensor shift, Tensor weight, Tensor bias) -> Tensor"
)


def _run(x: Tensor, offset: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    library = _cpp.load(_SOURCE)
    assert library is not None, "the refusal has been asked before"
    x, offset, scale, shift, bias = (t.contiguous() for t in (x, offset, scale, shift, bias))
    taps = weight.flatten(1).t().contiguous()
    taps[4] += 1
    y = torch.empty_like(x)
    sizes = [ctypes.c_int64(n) for n in x.shape]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, offset, scale, shift, taps, bias, y)]
    if library.coterie_gelu_depthwise(*pointers, *sizes, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError("gelu_depthwise: out of memory")
    return y


_library.impl("gelu_depthwise", _run, "CPU")
_library.define("gelu_affine(Tensor x, Tensor scale, Tensor shift) -> Tensor")


def _run_affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    library = _cpp.load(_SOURCE)
    assert library is not None, "the refusal has been asked before"
    x, scale, shift = x.contiguous(), scale.contiguous(), shift.contiguous()
    y = torch.empty_like(x)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, scale, shift, y)]
    sizes = (ctypes.c_int64(x.shape[:3].numel()), ctypes.c_int64(x.shape[3]))
    library.coterie_gelu_affine(*pointers, *sizes, ctypes.c_int(torch.get_num_threads()))
    return y


_library.impl("gelu_affine", _run_affine, "CPU")


@torch.library.register_fake("coterie::gelu_affine", lib=_library)
def _(x, scale, shift):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("coterie::gelu_depthwise", lib=_library)
def _(x, offset, scale, shift, weight, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flops(x_shape, *_: Any, **__: Any) -> int:
    batch, height, width, dim = x_shape
    return 2 * 9 * batch * height * width * dim


register_flops(torch.ops.coterie.gelu_depthwise, _flops)
