"""The operators `coterie::biased_group_attention` and its backward: the C++ kernels as torch sees them."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.ops import _cpp
from coterie.ops._flops import register_flops

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")

_library = torch.library.Library("coterie", "FRAGMENT")
_library.define(
    "biased_group_attention(Tensor qkv, Tensor groups, Tensor? bias, Tensor? key_mask, float scale) -> (Tensor, Tensor)"
)
_library.define(
    "biased_group_attention_backward(Tensor grad, Tensor qkv, Tensor groups, Tensor? bias, Tensor? key_mask, "
    "Tensor output, Tensor logsumexp, float scale, bool bias_needs_grad) -> (Tensor, Tensor)"
)


def _run(kernel: str, tensors: list[Tensor | None], qkv: Tensor, groups: Tensor, scale: float) -> None:
    library = _cpp.load(SOURCE)
    assert library is not None, "the refusal has been asked before"
    batch, tokens, _, heads, head_dim = qkv.shape
    error = getattr(library, f"coterie_{kernel}_{str(qkv.dtype).removeprefix('torch.')}")(
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors),
        (ctypes.c_int64 * 6)(batch, tokens, heads, head_dim, *groups.shape),
        ctypes.c_double(scale),
        ctypes.c_int(torch.get_num_threads()),
    )
    if error == 1:
        raise ValueError(
            f"biased_group_attention: groups must hold each token, 0 to {tokens - 1}, once at most, and one is "
            "outside or comes twice"
        )
    if error:
        raise MemoryError("biased_group_attention: out of memory")


def _packed(
    qkv: Tensor, groups: Tensor, bias: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    return qkv.contiguous(), groups.contiguous(), None if bias is None else bias.contiguous(), mask


def _forward(
    qkv: Tensor, groups: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    qkv, groups, bias, mask = _packed(qkv, groups, bias, key_mask)
    output = qkv.new_empty((*qkv.shape[:2], *qkv.shape[3:]))
    logsumexp = qkv.new_empty((qkv.shape[0], qkv.shape[3], qkv.shape[1]))
    _run("forward", [qkv, groups, bias, mask, output, logsumexp], qkv, groups, scale)
    return output, logsumexp


def _backward(
    grad: Tensor,
    qkv: Tensor,
    groups: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    qkv, groups, bias, mask = _packed(qkv, groups, bias, key_mask)
    grad, output, logsumexp = grad.contiguous(), output.contiguous(), logsumexp.contiguous()
    grad_qkv = torch.empty_like(qkv)
    grad_bias = qkv.new_empty((qkv.shape[3], groups.shape[1], groups.shape[1]) if bias_needs_grad else 0)
    tensors = [grad, qkv, groups, bias, mask, output, logsumexp, grad_qkv, grad_bias if bias_needs_grad else None]
    _run("backward", tensors, qkv, groups, scale)
    return grad_qkv, grad_bias


_library.impl("biased_group_attention", _forward, "CPU")
_library.impl("biased_group_attention_backward", _backward, "CPU")


@torch.library.register_fake("coterie::biased_group_attention", lib=_library)
def _(qkv, groups, bias, key_mask, scale):
    batch, tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty((batch, tokens, heads, head_dim)), qkv.new_empty((batch, heads, tokens))


@torch.library.register_fake("coterie::biased_group_attention_backward", lib=_library)
def _(grad, qkv, groups, bias, key_mask, output, logsumexp, scale, bias_needs_grad):
    places = groups.shape[1]
    return qkv.new_empty(qkv.shape), qkv.new_empty((qkv.shape[3], places, places) if bias_needs_grad else 0)


class BiasedGroupAttention(torch.autograd.Function):
    """Saves the log-sum-exp of every query, and recomputes the weights in the backward."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, groups: Tensor, bias: Tensor | None, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        output, logsumexp = torch.ops.coterie.biased_group_attention(qkv, groups, bias, key_mask, scale)
        ctx.save_for_backward(qkv, groups, bias, key_mask, output, logsumexp)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[2]
        grad_qkv, grad_bias = torch.ops.coterie.biased_group_attention_backward(
            grad, *ctx.saved_tensors, ctx.scale, wanted
        )
        return grad_qkv, None, grad_bias if wanted else None, None, None


# FLOPs are two per multiply-add, matrix products only, as torch.utils.flop_counter counts; places without a token too.
def _flops(qkv_shape, groups_shape, *_: Any, products: int = 2, **__: Any) -> int:
    batch, _tokens, _three, heads, head_dim = qkv_shape
    groups, places = groups_shape
    return 2 * products * batch * heads * groups * places * places * head_dim


def _backward_flops(grad_shape, qkv_shape, groups_shape, *_: Any, **__: Any) -> int:
    return _flops(qkv_shape, groups_shape, products=5)


register_flops(torch.ops.coterie.biased_group_attention, _flops)
register_flops(torch.ops.coterie.biased_group_attention_backward, _backward_flops)
