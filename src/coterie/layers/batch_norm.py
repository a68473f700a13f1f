"""Folding a batch normalisation that stands still into the linear layer beside it.

In evaluation BN(x) = a x + b per channel, so BN before or after a linear layer only changes that layer's weight and
bias. Both are computed anew at each call: this costs one pass over a weight instead of one over the activations, and
can never be stale (an EMA update or a loaded checkpoint is seen at once); gradients flow as without folding. Forward
hooks of a folded normalisation are not called.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coterie.ops._state import autocasting


def stands_still(*norms: _BatchNorm) -> bool:
    """Whether each of these batch normalisations uses its running statistics, so that it is a fixed affine map."""
    return all(not norm.training and norm.running_mean is not None for norm in norms)


def in_one_pass(norm: _BatchNorm, x: Tensor) -> bool:
    """Whether GELU and the normalisation after it are one pass over memory here: inference on the CPU in float32."""
    plain = x.is_cpu and x.dtype == torch.float32 and not autocasting("cpu")
    return plain and not torch.is_grad_enabled() and stands_still(norm)


def as_affine(norm: _BatchNorm) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """The (a, b) with BN(x) = a x + b of a batch normalisation that stands still; at least in float32."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch normalisation without running statistics is no fixed map: check stands_still first")
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps) * norm.weight
    return scale, norm.bias - norm.running_mean * scale


def fold_around(
    before: _BatchNorm, linear: nn.Linear, after: _BatchNorm
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """Weight and bias of the one linear layer that equals after(linear(before(x))), in the linear layer's dtype."""
    (scale_in, shift_in), (scale_out, shift_out) = as_affine(before), as_affine(after)
    weight = linear.weight * scale_out.unsqueeze(1)
    bias = (linear.bias * scale_out + shift_out).addmv(weight, shift_in)
    return (weight * scale_in).to(linear.weight.dtype), bias.to(linear.weight.dtype)
