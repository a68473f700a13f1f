"""The operator `coterie::depthwise_gelu` and its backward, as torch sees them: schemas, shapes, gradient and FLOPs."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.ops import _cpp
from coterie.ops._flops import register_flops

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")

_library = torch.library.Library("coterie", "FRAGMENT")
_library.define("depthwise_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor")
_library.define(
    "depthwise_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)"
)


def _call(name: str, tensors: tuple[Tensor, ...], shape: torch.Size) -> None:
    library = _cpp.load(SOURCE)
    assert library is not None, "the refusal has been asked before"
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    sizes = [ctypes.c_int64(n) for n in shape]
    if getattr(library, name)(*pointers, *sizes, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError(f"{name}: out of memory")


def _taps(weight: Tensor) -> Tensor:
    return weight.flatten(1).t().contiguous()


def _run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _call("coterie_depthwise_gelu", (x, _taps(weight), bias.contiguous(), y), x.shape)
    return y


def _run_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    dx, sums = torch.empty_like(x), x.new_zeros(10, x.shape[3])
    _call("coterie_depthwise_gelu_backward", (grad, x, _taps(weight), bias.contiguous(), dx, sums), x.shape)
    return dx, sums[:9].t().reshape(weight.shape), sums[9].clone()


_library.impl("depthwise_gelu", _run, "CPU")
_library.impl("depthwise_gelu_backward", _run_backward, "CPU")


@torch.library.register_fake("coterie::depthwise_gelu", lib=_library)
def _(x, weight, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("coterie::depthwise_gelu_backward", lib=_library)
def _(grad, x, weight, bias):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


class DepthwiseGelu(torch.autograd.Function):
    """The kernels with their gradient. Keeps the input alone: what GELU got is computed again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.ops.coterie.depthwise_gelu(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return torch.ops.coterie.depthwise_gelu_backward(grad, *ctx.saved_tensors)


# FLOPs are two per multiply-add of the convolution, as torch.utils.flop_counter counts.
def _flops(x_shape, *_: Any, **__: Any) -> int:
    batch, height, width, dim = x_shape
    return 2 * 9 * batch * height * width * dim


def _backward_flops(grad_shape, *_: Any, **__: Any) -> int:
    return 3 * _flops(grad_shape)  # once more for what is computed again


register_flops(torch.ops.coterie.depthwise_gelu, _flops)
register_flops(torch.ops.coterie.depthwise_gelu_backward, _backward_flops)
