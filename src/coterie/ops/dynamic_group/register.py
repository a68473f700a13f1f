"""The operators `coterie::dynamic_groups`, `coterie::grouped_attention` and its backward, as torch sees them.

Schemas, shapes for tracing, autograd and FLOP formulas. No kernel is built or imported before an operator runs.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from coterie.ops._flops import register_flops

_library = torch.library.Library("coterie", "FRAGMENT")
_library.define(
    "dynamic_groups(Tensor query, Tensor key, Tensor closeness, Tensor bias, Tensor direction, int top_k, "
    "Tensor? key_mask, bool normalize_keys, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "grouped_attention(Tensor query, Tensor key, Tensor value, Tensor assignment, Tensor selected, Tensor? key_mask, "
    "float scale, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "grouped_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor assignment, "
    "Tensor selected, Tensor? key_mask, Tensor output, Tensor logsumexp, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"coterie.ops.dynamic_group.{'triton_kernels' if backend == 'triton' else backend}")


def _run_groups(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    return _kernels(backend).dynamic_groups(*inputs)


def _run_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *inputs, backend = arguments
    return _kernels(backend).forward(*inputs)


def _run_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, backend = arguments
    return _kernels(backend).backward(*inputs)


for _key in ("CPU", "CUDA"):
    _library.impl("dynamic_groups", _run_groups, _key)
    _library.impl("grouped_attention", _run_forward, _key)
    _library.impl("grouped_attention_backward", _run_backward, _key)


@torch.library.register_fake("coterie::dynamic_groups", lib=_library)
def _(query, key, closeness, bias, direction, top_k, key_mask, normalize_keys, backend):
    shape = (*query.shape[:2], direction.shape[1], top_k)
    return query.new_empty(query.shape[:3], dtype=torch.int64), query.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("coterie::grouped_attention", lib=_library)
def _(query, key, value, assignment, selected, key_mask, scale, backend):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:3], value.shape[3])), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.register_fake("coterie::grouped_attention_backward", lib=_library)
def _(grad, query, key, value, assignment, selected, key_mask, output, logsumexp, scale, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


class GroupedAttention(torch.autograd.Function):
    """Attention over given groups; saves the log-sum-exp, and recomputes the weights in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        assignment: Tensor,
        selected: Tensor,
        key_mask: Tensor | None,
        scale: float,
        backend: str,
    ) -> Tensor:
        inputs = (query, key, value, assignment, selected, key_mask)
        output, logsumexp = torch.ops.coterie.grouped_attention(*inputs, scale, backend)
        ctx.save_for_backward(*inputs, output, logsumexp)
        ctx.scale, ctx.backend = scale, backend
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = torch.ops.coterie.grouped_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend)
        return (*gradients, None, None, None, None, None)


# FLOPs are two per multiply-add, matrix products only, as torch.utils.flop_counter counts.
def _groups_flops(query_shape, key_shape, closeness_shape, *_: Any, **__: Any) -> int:
    batch, heads, queries, head_dim = query_shape
    return 2 * batch * heads * (queries + key_shape[2]) * closeness_shape[1] * head_dim


def _attention_flops(query_shape, key_shape, value_shape, assignment_shape, selected_shape, *_: Any, **__: Any) -> int:
    batch, heads, queries, head_dim = query_shape
    return 2 * batch * heads * queries * selected_shape[3] * (head_dim + value_shape[3])


def _backward_flops(
    grad_shape, query_shape, key_shape, value_shape, assignment_shape, selected_shape, *_: Any, **__: Any
) -> int:
    batch, heads, queries, head_dim = query_shape
    return 2 * batch * heads * queries * selected_shape[3] * (3 * head_dim + 2 * value_shape[3])


register_flops(torch.ops.coterie.dynamic_groups, _groups_flops)
register_flops(torch.ops.coterie.grouped_attention, _attention_flops)
register_flops(torch.ops.coterie.grouped_attention_backward, _backward_flops)
