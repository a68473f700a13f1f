"""Composable attention: the heads' scores before the softmax, and their weights after it, are mixed across heads.

Dynamically Composable Multi-Head Attention, arXiv 2405.08553 (ICML 2024). The mixing map differs per pair of query and
key, and is a sum of a query's part and a key's part, each of low rank plus a diagonal: 10 multiply-adds per head and
pair with rank 2, beside the 2·head_dim of attention itself, twice. It acts pointwise in (query, key), so causality,
windows and padding hold as they do in plain attention.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coterie.ops import _checks as check
from coterie.ops._dispatch import Backend, BackendUnavailable, Call, Operation, register
from coterie.ops._state import autocasting
from coterie.ops.composable import cpu, reference
from coterie.ops.composable.maps import HeadComposition
from coterie.ops.composable.register import ComposableAttention

_OP = "composable_attention"


def composable_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    pre: HeadComposition | None,
    post: HeadComposition | None,
    *,
    is_causal: bool = False,
    window: int | None = None,
    attn_mask: Bool[Tensor, "#batch 1 #queries #keys"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention whose scores (`pre`) and weights (`post`) are composed across heads.

        L = compose(scale·q·kᵀ; pre)    P = compose(softmax(L, masked); post)    y = P·v

    with `compose` as `HeadComposition` says. Without maps it is `scaled_dot_product_attention`.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); `kv_heads` divides `heads`. With fewer key than query heads, query head
            h reads key and value head h // (heads / kv_heads), and the composition acts on the scores of the query
            heads, as if keys and values had been repeated.
        value: (batch, kv_heads, keys, value_dim).
        pre, post: the maps, for `heads` heads; None, like a `HeadComposition` without parts, leaves the heads alone.
            They may be float32 where the query is of a lower dtype.
        is_causal: the query at position t attends to keys up to t. With fewer queries than keys the last query stands
            at the last key (bottom-right aligned).
        window: keys nearer than this many positions, oneself counted: 256 with `is_causal` is 256 keys up to oneself,
            without it 255 to either side as well.
        attn_mask: bool, True where a query may attend to a key; (queries, keys) or (batch, 1, queries, keys), sizes of
            1 broadcast: key padding is (batch, 1, 1, keys). The same for all heads; combined with the other two.
        scale: factor of the scores; head_dim ** -0.5 if None.
        backend: "auto", "cpu", "triton", "native" or "reference"; `coterie.explain(composable_attention, ...)` tells
            about them.

    Returns:
        (batch, heads, queries, value_dim); a query with nothing to attend to gets zeros. Differentiable in query, key,
        value and every part of both maps, once; by "reference" as often as wanted.

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value)
    pre, post = _check_maps("pre", pre, query, key), _check_maps("post", post, query, key)
    if not isinstance(is_causal, bool):
        raise TypeError(f"{_OP}: is_causal must be a bool, got {type(is_causal).__name__}")
    if window is not None:
        check.check_positive_int(_OP, "window", window)
    attn_mask = _check_mask(attn_mask, query, key)
    check.check_scale(_OP, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    chosen = COMPOSABLE_ATTENTION.choose(backend, _describe(query, key, value, pre, post))
    if chosen == "reference":
        device = query.device.type
        with torch.autocast(device, enabled=False) if autocasting(device) else nullcontext():
            return reference.composable_attention(query, key, value, pre, post, is_causal, window, attn_mask, scale)
    return ComposableAttention.apply(query, key, value, is_causal, window, attn_mask, scale, chosen, *pre, *post)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """Query, key and value in autocast's dtype, as `scaled_dot_product_attention` takes them; the maps stay."""
    if not all(isinstance(x, Tensor) for x in tensors):
        return tensors  # the checks name the culprit
    device = tensors[0].device.type
    if not autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check_tensors(query: Any, key: Any, value: Any) -> None:
    check.check_tensor(_OP, "query", query, "batch heads queries head_dim")
    check.check_tensor(_OP, "key", key, "batch heads keys head_dim")
    check.check_tensor(_OP, "value", value, "batch heads keys value_dim")
    check.check_same(_OP, "batch", "query and key", query.shape[0], key.shape[0])
    check.check_same(_OP, "head_dim", "query and key", query.shape[3], key.shape[3])
    check.check_same(_OP, "(batch, heads, keys)", "key and value", key.shape[:3], value.shape[:3])
    for name, x in (("key", key), ("value", value)):
        check.check_same(_OP, "device", f"query and {name}", query.device, x.device)
        check.check_same(_OP, "dtype", f"query and {name}", query.dtype, x.dtype)
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{_OP}: the heads of key and value must divide those of query, got {key.shape[1]} and {query.shape[1]}"
        )


_LAYOUTS = {
    "query_in": "batch queries rank heads",
    "query_out": "batch queries rank heads",
    "query_gate": "batch queries heads",
    "key_in": "batch keys rank heads",
    "key_out": "batch keys rank heads",
    "key_gate": "batch keys heads",
    "static": "heads heads",
}


def _check_maps(name: str, maps: Any, query: Tensor, key: Tensor) -> HeadComposition:
    """The maps, checked against the shapes of query and key."""
    if maps is None:
        return HeadComposition()
    if not isinstance(maps, HeadComposition):
        raise TypeError(f"{_OP}: {name} must be a HeadComposition or None, got {type(maps).__name__}")
    sizes = {"batch": query.shape[0], "queries": query.shape[2], "keys": key.shape[2], "heads": query.shape[1]}
    for field, part in zip(HeadComposition._fields, maps, strict=True):
        if part is None:
            continue
        check.check_tensor(_OP, f"{name}.{field}", part, _LAYOUTS[field])
        sizes["rank"] = part.shape[2] if part.ndim == 4 else 0
        want = tuple(sizes[word] for word in _LAYOUTS[field].split())
        if tuple(part.shape) != want:
            shape = ", ".join(_LAYOUTS[field].split())
            raise ValueError(f"{_OP}: {name}.{field} must have shape ({shape}) = {want}, got {tuple(part.shape)}")
        check.check_same(_OP, "device", f"query and {name}.{field}", query.device, part.device)
        if part.dtype != query.dtype and (part.dtype != torch.float32 or query.dtype == torch.float64):
            raise ValueError(f"{_OP}: {name}.{field} must be {query.dtype} or float32, got {part.dtype}")
    for side in ("query", "key"):
        first, second = (getattr(maps, f"{side}_{way}") for way in ("in", "out"))
        if (first is None) != (second is None):
            lone, other = (f"{side}_out", f"{side}_in") if first is None else (f"{side}_in", f"{side}_out")
            raise ValueError(f"{_OP}: {name}.{lone} needs {name}.{other}, got None")
        if first is not None:
            check.check_same(_OP, "rank", f"{name}.{side}_in and {name}.{side}_out", first.shape[2], second.shape[2])
    return maps


def _check_mask(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as (1 or batch, 1, 1 or queries, 1 or keys)."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{_OP}: attn_mask must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{_OP}: attn_mask must be bool (True = may attend), got {mask.dtype}")
    sizes = (query.shape[0], 1, query.shape[2], key.shape[2])
    full = mask[(None,) * max(0, 4 - mask.ndim)]
    if full.ndim != 4 or any(have not in (1, want) for have, want in zip(full.shape, sizes, strict=True)):
        raise ValueError(
            f"{_OP}: attn_mask must broadcast to (batch, 1, queries, keys) = {sizes}, the same for all heads, "
            f"got {tuple(mask.shape)}"
        )
    check.check_same(_OP, "device", "query and attn_mask", query.device, mask.device)
    return full


@dataclass(frozen=True)
class ComposedCall(Call):
    """A call, and how many heads compose."""

    heads: int = 1


def _describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pre: HeadComposition | None = None,
    post: HeadComposition | None = None,
    **_: Any,
) -> ComposedCall:
    parts = [x for x in (*(pre or ()), *(post or ())) if x is not None]
    call = Call.of(query, key, value)
    grad = call.needs_grad or (torch.is_grad_enabled() and any(x.requires_grad for x in parts))
    return ComposedCall(call.device, call.dtype, call.head_dim, grad, call.exporting, query.shape[1])


def _triton_refusal(call: Call) -> str | None:
    if call.exporting:
        return _EXPORTED
    if isinstance(call, ComposedCall) and call.heads > 64:
        return f"it takes up to 64 heads, as all of a tile must fit on the chip, got {call.heads}"
    if call.device == "cpu":
        from coterie.ops._triton import interpreting

        return None if interpreting() else "it takes CUDA tensors (or TRITON_INTERPRET=1 for tests), got cpu"
    if call.device != "cuda":
        return f"it takes CUDA tensors, got {call.device}"
    if call.dtype == torch.float64:
        return "it computes in float32: float64 is served by 'native' and 'reference'"
    if call.head_dim > 256:
        return f"it takes head_dim up to 256, got {call.head_dim}"
    from coterie.ops._triton import missing

    return missing()


def _cpu_refusal(call: Call) -> str | None:
    return _EXPORTED if call.exporting else cpu.refusal(call)


_EXPORTED = "an exported program holds torch operators only, so that it runs without coterie"
COMPOSABLE_ATTENTION = register(
    Operation(
        _OP,
        (
            Backend("triton", "fused GPU kernels in Triton", _triton_refusal),
            Backend("cpu", "C++ kernels, compiled on first use", _cpu_refusal),
            Backend("native", "torch operators on chunks of queries", lambda c: _EXPORTED if c.exporting else None),
            Backend("reference", "the definition, all scores at once", lambda call: None),
        ),
        _describe,
    )
)

__all__ = ["BackendUnavailable", "HeadComposition", "composable_attention"]
