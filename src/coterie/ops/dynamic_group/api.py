"""Dynamic group attention: each query joins the group of its nearest centroid, and each group attends to its own
top-k keys.

Dynamic Group Transformer, arXiv 2203.03937 (IJCAI 2022). `dynamic_group_attention` is `dynamic_groups` (who belongs
where, and which
keys a group has chosen: no gradient) followed by `grouped_attention` (exact softmax attention inside the groups).
    Cost is
2 * queries * top_k * head_dim multiply-adds a head for attention and (queries + keys) * groups * head_dim for
grouping: linear in tokens.
"""

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from coterie.ops import _checks as check
from coterie.ops._dispatch import Backend, BackendUnavailable, Call, Operation, register
from coterie.ops._state import autocasting
from coterie.ops.dynamic_group import cpu, native, reference
from coterie.ops.dynamic_group.register import GroupedAttention

METRICS = ("cosine", "l2", "dot")


def dynamic_groups(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    centroids: Float[Tensor, "heads groups head_dim"],
    top_k: int,
    *,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    metric: str = "cosine",
    normalize_keys: bool = False,
) -> tuple[Int[Tensor, "batch heads queries"], Int[Tensor, "batch heads groups selected"]]:
    """Group every query by its nearest centroid and choose the most relevant keys of every group. Not differentiable.

    Computed in float32 whatever the dtype and whatever autocast says, with ties going to the lower index, because a
    group that flips
    changes whole rows of the output.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, heads, keys, head_dim).
        centroids: (heads, groups, head_dim); their length matters only to the metrics "l2" and "dot".
        top_k: keys chosen by each group; at most all keys are.
        key_mask: (batch, keys), True where a key may be chosen. A group is filled up with masked keys only when too
            few others exist;
            give the same mask to `grouped_attention`, which leaves them out.
        metric: which centroid is nearest to q: "cosine" largest <q, e/|e|>, "l2" smallest |q - e|, "dot" largest <q,
            e>.
        normalize_keys: choose by <e/|e|, k/|k|> instead of <e/|e|, k>.

    Returns:
        assignment (batch, heads, queries) int64: the group of each query.
        selected (batch, heads, groups, min(top_k, keys)) int64: the keys of each group, all different, in rising order.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit; NaN in centroids.
    """
    op = "dynamic_groups"
    _check_query_and_key(op, query, key, key_mask)
    _check_centroids(op, query, centroids)
    check.check_positive_int(op, "top_k", top_k)
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")

    autocast = autocasting(query.device.type)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False) if autocast else nullcontext():
        centroids = centroids.detach().float()
        direction = reference.normalised(centroids).contiguous()
        closeness = direction if metric == "cosine" else centroids.contiguous()
        bias = centroids.square().sum(-1) / -2 if metric == "l2" else centroids.new_zeros(centroids.shape[:2])
        top_k = min(top_k, key.shape[2])
        arguments = (query.detach(), key.detach(), closeness, bias, direction, top_k, key_mask, bool(normalize_keys))
        call = Call.of(query.detach())
        if call.exporting or call.device not in ("cpu", "cuda"):
            return native.dynamic_groups(*arguments)
        backend = "native" if cpu.refusal(call) else "cpu"
        return torch.ops.coterie.dynamic_groups(*arguments, backend)


def grouped_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    assignment: Int[Tensor, "batch heads queries"],
    selected: Int[Tensor, "batch heads groups selected"],
    *,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Softmax attention of every query over the keys that its group has chosen.

    The groups may come from anywhere (clusters, routing, windows): query i attends to the keys `selected[b, h,
    assignment[b, h, i]]`,
    which must be different ones. A query whose keys are all masked gets zeros.

    Args:
        query, key: (batch, heads, queries | keys, head_dim).
        value: (batch, heads, keys, value_dim).
        assignment: (batch, heads, queries) int64 in [0, groups).
        selected: (batch, heads, groups, selected) int64 in [0, keys).
        key_mask: (batch, keys), True where a key may be attended to.
        scale: factor of the scores; head_dim ** -0.5 if None.
        backend: "auto", "cpu", "triton", "native" or "reference"; `coterie.explain(grouped_attention, ...)` tells
            about them.

    Returns:
        (batch, heads, queries, value_dim), differentiable in query, key and value.

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    op = "grouped_attention"
    _check_query_and_key(op, query, key, key_mask)
    _check_value(op, key, value)
    check.check_index(op, "assignment", assignment, "batch heads queries")
    check.check_index(op, "selected", selected, "batch heads groups selected")
    check.check_same(op, "(batch, heads, queries)", "query and assignment", query.shape[:3], assignment.shape)
    check.check_same(op, "(batch, heads)", "query and selected", query.shape[:2], selected.shape[:2])
    check.check_same(op, "device", "query and assignment", query.device, assignment.device)
    check.check_same(op, "device", "query and selected", query.device, selected.device)
    if selected.shape[2] == 0 or selected.shape[3] == 0:
        raise ValueError(f"{op}: selected must hold at least one group and one key, got {tuple(selected.shape)}")
    check.check_scale(op, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    chosen = GROUPED_ATTENTION.choose(backend, Call.of(query, key, value))
    arguments = (query, key, value, assignment, selected, key_mask, scale)
    if chosen == "reference":
        _check_ranges(op, assignment, selected, key.shape[2])
        return reference.grouped_attention(*arguments)
    if chosen == "native":
        _check_ranges(op, assignment, selected, key.shape[2])
        return native.grouped_attention(*arguments)
    return GroupedAttention.apply(*arguments, chosen)


def dynamic_group_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    centroids: Float[Tensor, "heads groups head_dim"],
    top_k: int,
    *,
    key_mask: Bool[Tensor, "batch keys"] | None = None,
    scale: float | None = None,
    metric: str = "cosine",
    normalize_keys: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention in which queries form groups around centroids, and each group attends to its own top-k keys.

    y_i = softmax over id_g(i) of (scale <q_i, k_j>) v_j, with g(i) the nearest centroid of q_i and id_g the `top_k`
    keys of largest
    <e_g/|e_g|, k_j> (DGT, arXiv 2203.03937, dynamic group attention). Linear in the tokens. With `top_k` at least the
    number of keys
    it is `scaled_dot_product_attention`. The gradient reaches query, key and value through the softmax only;
    centroids get none.

    Args:
        query, key: (batch, heads, queries | keys, head_dim); cross-attention has its own number of keys.
        value: (batch, heads, keys, value_dim).
        centroids: (heads, groups, head_dim).
        top_k, key_mask, metric, normalize_keys: see `dynamic_groups`.
        scale, backend: see `grouped_attention`.

    Returns:
        (batch, heads, queries, value_dim).

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    op = "dynamic_group_attention"
    _check_query_and_key(op, query, key, key_mask)
    _check_value(op, key, value)
    _check_centroids(op, query, centroids)
    check.check_positive_int(op, "top_k", top_k)
    check.check_scale(op, scale)
    if metric not in METRICS:
        raise ValueError(f"{op}: metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    chosen = GROUPED_ATTENTION.choose(backend, Call.of(query, key, value))
    if top_k >= key.shape[2]:
        return _exact(query, key, value, key_mask, scale)
    assignment, selected = dynamic_groups(
        query, key, centroids, top_k, key_mask=key_mask, metric=metric, normalize_keys=normalize_keys
    )
    return grouped_attention(query, key, value, assignment, selected, key_mask=key_mask, scale=scale, backend=chosen)


def _exact(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
    if key_mask is None:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    output = scaled_dot_product_attention(query, key, value, attn_mask=key_mask[:, None, None], scale=scale)
    return output.masked_fill(~key_mask.any(-1)[:, None, None, None], 0.0)


def _check_query_and_key(op: str, query: Any, key: Any, key_mask: Any) -> None:
    check.check_tensor(op, "query", query, "batch heads queries head_dim")
    check.check_tensor(op, "key", key, "batch heads keys head_dim")
    check.check_same(op, "batch", "query and key", query.shape[0], key.shape[0])
    check.check_same(op, "heads", "query and key", query.shape[1], key.shape[1])
    check.check_same(op, "head_dim", "query and key", query.shape[3], key.shape[3])
    check.check_same(op, "device", "query and key", query.device, key.device)
    check.check_same(op, "dtype", "query and key", query.dtype, key.dtype)
    check.check_key_mask(op, key_mask, query.shape[0], key.shape[2], query.device)


def _check_value(op: str, key: Tensor, value: Any) -> None:
    check.check_tensor(op, "value", value, "batch heads keys value_dim")
    check.check_same(op, "(batch, heads, keys)", "key and value", key.shape[:3], value.shape[:3])
    check.check_same(op, "device", "key and value", key.device, value.device)
    check.check_same(op, "dtype", "key and value", key.dtype, value.dtype)


def _check_centroids(op: str, query: Tensor, centroids: Any) -> None:
    check.check_tensor(op, "centroids", centroids, "heads groups head_dim")
    check.check_same(op, "heads", "query and centroids", query.shape[1], centroids.shape[0])
    check.check_same(op, "head_dim", "query and centroids", query.shape[3], centroids.shape[2])
    check.check_same(op, "device", "query and centroids", query.device, centroids.device)
    check.check_finite_once(op, "centroids", centroids)


def _check_ranges(op: str, assignment: Tensor, selected: Tensor, keys: int) -> None:
    """The torch operators would crash, or read a wrong row, much later. Only where looking is free of waiting and of
    graph breaks."""
    if torch.compiler.is_compiling() or assignment.device.type != "cpu" or torch.is_inference_mode_enabled():
        return
    for name, index, limit in (("assignment", assignment, selected.shape[2]), ("selected", selected, keys)):
        low, high = index.aminmax()
        if low < 0 or high >= limit:
            raise ValueError(f"{op}: {name} must lie in [0, {limit}), it holds {int(low if low < 0 else high)}")


def _triton_refusal(call: Call) -> str | None:
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
    if call.exporting:
        return "an exported program holds torch operators only, so that it runs without coterie"
    return cpu.refusal(call)


def _describe(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Call:
    return Call.of(query, key, value)


_BACKENDS = (
    Backend("triton", "fused GPU kernels in Triton", _triton_refusal),
    Backend("cpu", "C++ kernels, compiled on first use", _cpu_refusal),
    Backend("native", "torch operators on tiles of one group each", lambda call: None),
    Backend("reference", "the definition, a dense boolean mask", lambda call: None, only_by_name=True),
)
GROUPED_ATTENTION = register(Operation("grouped_attention", _BACKENDS, _describe))
register(Operation("dynamic_group_attention", _BACKENDS, _describe))

__all__ = ["BackendUnavailable", "dynamic_group_attention", "dynamic_groups", "grouped_attention"]
