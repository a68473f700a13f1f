"""Attention inside disjoint groups of tokens (windows, or tokens far apart), with a bias on the logits.

The C++ kernel reads queries, keys and values where a linear layer has put them, whatever the groups are: nothing is cut
out, padded or put back, and the gradient arrives as that layer wants it. Where the kernel cannot serve, it is torch
operators.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.ops import _checks as check
from coterie.ops import _cpp
from coterie.ops._dispatch import Backend, Call, Operation, register
from coterie.ops._state import autocasting, exporting
from coterie.ops.biased_group_attention import reference
from coterie.ops.biased_group_attention.register import SOURCE, BiasedGroupAttention


def biased_group_attention(
    qkv: Float[Tensor, "batch tokens 3 heads head_dim"],
    groups: Int[Tensor, "groups places"],
    bias: Float[Tensor, "heads places places"] | None = None,
    *,
    key_mask: Bool[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch tokens heads head_dim"]:
    """y_i = softmax over the group of token i of (scale <q_i, k_j> + bias[place of i, place of j]) v_j.

    Args:
        qkv: (batch, tokens, 3, heads, head_dim): query, key and value of every token.
        groups: (groups, places) int64: the tokens of each group, the same for every image; negative at a place without
            one. A token is in one group at most; one that is in none gets zeros.
        bias: (heads, places, places), or None.
        key_mask: (batch, tokens) bool, True = may be attended to. A token whose group has no such key gets zeros.
        scale: of the logits; 1 / sqrt(head_dim) if None.
        backend: "auto", "cpu" (C++, float32 and float64) or "reference".

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    op = "biased_group_attention"
    check.check_tensor(op, "qkv", qkv, "batch tokens 3 heads head_dim")
    check.check_same(op, "their number", "3 and qkv's query, key and value", 3, qkv.shape[2])
    check.check_index(op, "groups", groups, "groups places")
    check.check_same(op, "device", "qkv and groups", qkv.device, groups.device)
    if bias is not None:
        check.check_tensor(op, "bias", bias, "heads places places")
        places = groups.shape[1]
        check.check_same(op, "shape", "(heads, places, places) and bias", (qkv.shape[3], places, places), bias.shape)
        check.check_same(op, "dtype", "qkv and bias", qkv.dtype, bias.dtype)
        check.check_same(op, "device", "qkv and bias", qkv.device, bias.device)
    check.check_key_mask(op, key_mask, qkv.shape[0], qkv.shape[1], qkv.device)
    check.check_scale(op, scale)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    call = _describe(qkv, groups, bias)
    if BIASED_GROUP_ATTENTION.choose(backend, call) == "reference":
        return reference.forward(qkv, groups, bias, key_mask, scale)
    if call.needs_grad:
        return BiasedGroupAttention.apply(qkv, groups, bias, key_mask, scale)
    return torch.ops.coterie.biased_group_attention(qkv, groups, bias, key_mask, scale)[0]


def _describe(qkv: Tensor, groups: Tensor | None = None, bias: Tensor | None = None, **_: Any) -> Call:
    return Call(
        device=qkv.device.type,
        dtype=qkv.dtype,
        head_dim=qkv.shape[-1],
        needs_grad=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, bias)),
        exporting=exporting() or autocasting(qkv.device.type),
    )


def _cpu_refusal(call: Call) -> str | None:
    if call.exporting:
        return "an exported program, and autocast, take torch operators only"
    if call.device != "cpu" or call.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64 on the CPU, got {call.dtype} on {call.device}"
    return _kernel_refusal()


def _kernel_refusal() -> str | None:
    return _cpp.refusal(SOURCE)


# What torch.compiler.assume_constant_result does; calling that at import would load the compiler, and triton with it.
_kernel_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]

_BACKENDS = (
    Backend("cpu", "C++ kernel, compiled on first use", _cpu_refusal),
    Backend("reference", "torch operators", lambda call: None),
)
BIASED_GROUP_ATTENTION = register(Operation("biased_group_attention", _BACKENDS, _describe))
