"""The definition of dynamic group attention, in plain torch: short, differentiable, exact in float64, quadratic in
memory.

Dynamic Group Transformer, arXiv 2203.03937; for every image and head, with queries q_i, keys k_i, values v_i and
centroids e_j:

    group       g(i)  = argmax_j <q_i, e_j / |e_j|>                      (metric "cosine")
    selection   id_j  = the k largest <e_j / |e_j|, k_i> over all keys i
    attention   y_i   = softmax over id_g(i) of (scale <q_i, k>)  applied to the values of id_g(i)
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def normalised(x: Tensor) -> Tensor:
    """Rows of unit length; a zero row stays zero."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def dynamic_groups(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    centroids: Float[Tensor, "heads groups head_dim"],
    top_k: int,
    key_mask: Bool[Tensor, "batch keys"] | None,
    metric: str,
    normalize_keys: bool,
) -> tuple[Int[Tensor, "batch heads queries"], Int[Tensor, "batch heads groups selected"]]:
    """The group of each query and the chosen keys of each group, in float32; ties go to the lower index."""
    query, key, centroids = query.detach().float(), key.detach().float(), centroids.detach().float()
    direction = normalised(centroids)

    closeness = torch.einsum("bhid,hgd->bhig", query, direction if metric == "cosine" else centroids)
    if metric == "l2":  # |q - e|^2 = |q|^2 - 2 (<q, e> - |e|^2 / 2), and |q|^2 is the same for every group
        closeness = closeness - centroids.square().sum(-1).unsqueeze(1) / 2
    assignment = closeness.argmax(-1)

    relevance = torch.einsum("hgd,bhid->bhgi", direction, normalised(key) if normalize_keys else key)
    if key_mask is not None:
        relevance = relevance.masked_fill(~key_mask[:, None, None], float("-inf"))
    order = relevance.sort(dim=-1, descending=True, stable=True).indices
    return assignment, order[..., : min(top_k, key.shape[2])].sort(dim=-1).values


def grouped_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    assignment: Int[Tensor, "batch heads queries"],
    selected: Int[Tensor, "batch heads groups selected"],
    key_mask: Bool[Tensor, "batch keys"] | None,
    scale: float,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Dense attention under the boolean mask 'key j is among those chosen by the group of query i'."""
    batch, heads, queries, keys = *query.shape[:3], key.shape[2]
    chosen = torch.zeros(batch, heads, selected.shape[2], keys, dtype=torch.bool, device=query.device)
    chosen = chosen.scatter(-1, selected, True)
    allowed = chosen.gather(2, assignment.unsqueeze(-1).expand(batch, heads, queries, keys))
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None]
    scores = (scale * query @ key.transpose(-1, -2)).masked_fill(~allowed, float("-inf"))
    empty = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights @ value
