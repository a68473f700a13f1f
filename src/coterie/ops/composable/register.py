"""The operators `coterie::composable_attention` and its backward, as torch sees them.

Schemas, shapes for tracing, autograd and FLOP formulas. No kernel is built or imported before an operator runs.
"""

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from coterie.ops._flops import register_flops
from coterie.ops._state import autocasting
from coterie.ops.composable.maps import HeadComposition

PARTS = len(HeadComposition._fields)
_OPTIONS = "bool is_causal, SymInt? window, Tensor? attn_mask, float scale, str backend"
_library = torch.library.Library("coterie", "FRAGMENT")
_library.define(
    f"composable_attention(Tensor query, Tensor key, Tensor value, Tensor?[] pre, Tensor?[] post, {_OPTIONS}) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "composable_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor?[] pre, Tensor?[] post, "
    f"Tensor logsumexp, {_OPTIONS}) -> Tensor[]"
)


def _kernels(backend: str) -> ModuleType:
    return importlib.import_module(f"coterie.ops.composable.{'triton_kernels' if backend == 'triton' else backend}")


def _as_given(x: Tensor) -> AbstractContextManager:
    """Autocast would lower the products inside; what is to be lowered is so already."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x.device.type) else nullcontext()


def _run_forward(
    query: Tensor, key: Tensor, value: Tensor, pre: Sequence[Tensor | None], post: Sequence[Tensor | None],
    *options: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *rest, backend = options
    with _as_given(query):
        return _kernels(backend).forward(query, key, value, HeadComposition(*pre), HeadComposition(*post), *rest)


def _run_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, pre: Sequence[Tensor | None],
    post: Sequence[Tensor | None], logsumexp: Tensor, *options: Any
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key, value, and of the parts that exist of `pre` and `post`, each with its own memory."""
    *rest, backend = options
    maps = HeadComposition(*pre), HeadComposition(*post)
    with _as_given(query):
        first, second, third = _kernels(backend).backward(grad, query, key, value, *maps, logsumexp, *rest)
    return [*first, *(x for x in (*second, *third) if x is not None)]


_library.impl("composable_attention", _run_forward, "CompositeExplicitAutograd")
_library.impl("composable_attention_backward", _run_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("coterie::composable_attention", lib=_library)
def _(query, key, value, pre, post, is_causal, window, attn_mask, scale, backend):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((*query.shape[:3], value.shape[3])), query.new_empty(query.shape[:3], dtype=wide)


@torch.library.register_fake("coterie::composable_attention_backward", lib=_library)
def _(grad, query, key, value, pre, post, logsumexp, is_causal, window, attn_mask, scale, backend):
    return [x.new_empty(x.shape) for x in (query, key, value, *pre, *post) if x is not None]


class ComposableAttention(torch.autograd.Function):
    """Attention composed across heads; saves the log-sum-exp, and recomputes the weights in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        window: int | None,
        attn_mask: Tensor | None,
        scale: float,
        backend: str,
        *maps: Tensor | None,
    ) -> Tensor:
        """`maps` are the parts of `pre`, then those of `post`."""
        pre, post = list(maps[:PARTS]), list(maps[PARTS:])
        output, logsumexp = torch.ops.coterie.composable_attention(
            query, key, value, pre, post, is_causal, window, attn_mask, scale, backend
        )
        ctx.save_for_backward(query, key, value, attn_mask, logsumexp, *maps)
        ctx.is_causal, ctx.window, ctx.scale, ctx.backend = is_causal, window, scale, backend
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, attn_mask, logsumexp, *maps = ctx.saved_tensors
        pre, post = list(maps[:PARTS]), list(maps[PARTS:])
        gradients = torch.ops.coterie.composable_attention_backward(
            grad, query, key, value, pre, post, logsumexp, ctx.is_causal, ctx.window, attn_mask, ctx.scale, ctx.backend
        )
        found = iter(gradients[3:])
        parts = [None if x is None else next(found) for x in maps]
        return (*gradients[:3], None, None, None, None, None, *parts)


# FLOPs are two per multiply-add, of the products and the compositions; causality is not looked at, as torch does not.
def _composing(maps: Sequence[Any], heads: int) -> int:
    """Multiply-adds of one composition per pair of query and key."""
    query_in, _, query_gate, key_in, _, key_gate, static = maps
    ranks = sum(shape[2] for shape in (query_in, key_in) if shape is not None)
    gates = sum(shape is not None for shape in (query_gate, key_gate))
    return heads * (2 * ranks + gates + (0 if static is None else heads))


def _flops(query_shape, key_shape, value_shape, pre_shapes, post_shapes, *_: Any, **__: Any) -> int:
    batch, heads, queries, head_dim = query_shape
    composing = _composing(pre_shapes, heads) + _composing(post_shapes, heads)
    return 2 * batch * queries * key_shape[2] * (heads * (head_dim + value_shape[3]) + composing)


def _backward_flops(
    grad_shape, query_shape, key_shape, value_shape, pre_shapes, post_shapes, *_: Any, **__: Any
) -> int:
    batch, heads, queries, head_dim = query_shape
    composing = _composing(pre_shapes, heads) + _composing(post_shapes, heads)
    return 2 * batch * queries * key_shape[2] * (heads * (3 * head_dim + 2 * value_shape[3]) + 3 * composing)


register_flops(torch.ops.coterie.composable_attention, _flops)
register_flops(torch.ops.coterie.composable_attention_backward, _backward_flops)
