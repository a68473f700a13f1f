"""Dynamic group attention: queries that are alike form a group, and each group attends to the keys that concern it.

Dynamic Group Transformer, arXiv 2203.03937 (IJCAI 2022). Every head keeps `groups` centroids. A query joins the group
of its nearest centroid; each group chooses the `top_k` most relevant keys of the whole image by its centroid; softmax
attention is exact inside the group. Cost is linear in the tokens. The centroids are not learned by gradient: they
follow the mean query of their group (`coterie.attention.centroids`).

    x (batch, *grid, dim) -> query, key, value (batch, heads, tokens, head_dim), centroids (heads, groups, head_dim)
      -> group of each query (batch, heads, tokens), keys of each group (batch, heads, groups, top_k)
      -> output (batch, *grid, dim)

The paper's text leaves open which metric assigns queries, whether keys are normalised before they are chosen, whether
logits are dot products or cosines, and how fast the centroids move: each is an option here, and its default is our
reading. There is no authors' code.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.attention.base import GridAttention, check_choice, check_int, exact_attention, register_attention
from coterie.attention.centroids import MovingCentroids
from coterie.ops import dynamic_group_attention, dynamic_groups, grouped_attention
from coterie.ops.dynamic_group.api import METRICS


@register_attention("dynamic_group")
class DynamicGroupAttention(MovingCentroids, GridAttention):
    """Attention of query groups to their own top-k keys.

    Args:
        dim, num_heads, and the keywords of GridAttention. With `similarity="cosine"` queries and keys have length one
            throughout: for grouping, choosing and attending.
        groups: centroids per head (the paper: 48).
        top_k: keys that each group attends to (the paper: 98 for ImageNet); with `top_k` >= tokens this is exact global
            attention.
        metric: which centroid is nearest to a query: "cosine", "l2" or "dot".
        normalize_keys: choose keys by their cosine with the centroid, instead of their dot product with it (where long
            keys win).
        centroid_rate: a centroid moves by `tau = centroid_rate * learning rate` towards its group's mean at each
            optimizer step.
        default_tau: what moves it in a training loop that never called `follow_learning_rate`.
        global_tokens: so many tokens at the start of a 1-dimensional grid (class and register tokens) are seen by every
            query and see every key; they join no group.
        backend: of `coterie.ops.grouped_attention`.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self", "bidirectional cross"})
    operation: ClassVar[str] = "dynamic_group_attention"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        groups: int = 48,
        top_k: int = 98,
        metric: str = "cosine",
        normalize_keys: bool = False,
        centroid_rate: float = 0.1,
        default_tau: float = 1e-4,
        global_tokens: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        check_int("groups", groups)
        check_int("top_k", top_k)
        check_choice("metric", metric, METRICS)
        check_int("global_tokens", global_tokens, 0)
        self.groups, self.top_k, self.metric, self.normalize_keys = groups, top_k, metric, normalize_keys
        self.global_tokens, self.backend = global_tokens, backend
        self.init_centroids(groups, rate=centroid_rate, default_tau=default_tau, device=device, dtype=dtype)

    def attend(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch heads keys head_dim"],
        value: Float[Tensor, "batch heads keys head_dim"],
        *,
        grid: tuple[int, ...],
        key_grid: tuple[int, ...] | None,
        mask: Bool[Tensor, "batch keys"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        first = self._first_ordinary(grid, key_grid)
        self.settle_centroids()
        scaled, scale = self.scaled(query)
        counted = mask[:, first:] if mask is not None and key_grid is None else None  # padding moves no centroid
        everything = self.top_k >= key.shape[2] - first
        if self.training or not everything:
            assignment, selected = self._groups(query, key, mask, first, top_k=1 if everything else self.top_k)
        if self.training:
            self.observe_queries(query[:, :, first:], assignment, counted)
        if everything:  # then the operation is plain attention
            return dynamic_group_attention(
                scaled, key, value, self.centroids, key.shape[2], key_mask=mask, scale=scale, backend=self.backend
            )
        y = grouped_attention(
            scaled[:, :, first:], key, value, assignment, selected, key_mask=mask, scale=scale, backend=self.backend
        )
        if first:
            allowed = None if mask is None else mask[:, None, None]
            y = torch.cat([exact_attention(scaled[:, :, :first], key, value, allowed=allowed, scale=scale), y], 2)
        return y

    def groups_of(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Float[Tensor, "batch *key_grid dim"] | None = None,
        *,
        mask: Bool[Tensor, " batch *key_grid"] | None = None,
    ) -> tuple[Int[Tensor, "batch heads queries"], Int[Tensor, "batch heads groups selected"]]:
        """Look at the groups that `forward` would form: nothing is updated, and no gradient flows.

        Takes what `forward` takes. Queries and keys are numbered in raster order of their grids. With `global_tokens`
        the assignment leaves these out, and every group's keys begin with them.

        Returns:
            assignment (batch, heads, queries) int64 and selected (batch, heads, groups, min(top_k, keys)) int64.
        """
        self.check(x, context, mask=mask)
        grid = tuple(x.shape[1:-1])
        key_grid = None if context is None else tuple(context.shape[1:-1])
        first = self._first_ordinary(grid, key_grid)
        with torch.no_grad():
            query, key, _ = self.project(x, context)
            return self._groups(query, key, None if mask is None else mask.flatten(1), first, top_k=self.top_k)

    def extra_repr(self) -> str:
        tokens = f", global_tokens={self.global_tokens}" if self.global_tokens else ""
        return f"{super().extra_repr()}, groups={self.groups}, top_k={self.top_k}, metric={self.metric}{tokens}"

    def _groups(
        self, query: Tensor, key: Tensor, mask: Tensor | None, first: int, *, top_k: int
    ) -> tuple[Int[Tensor, "batch heads queries"], Int[Tensor, "batch heads groups selected"]]:
        assignment, selected = dynamic_groups(
            query[:, :, first:],
            key[:, :, first:],
            self.centroids,
            top_k,
            key_mask=None if mask is None else mask[:, first:],
            metric=self.metric,
            normalize_keys=self.normalize_keys,
        )
        if first:
            always = torch.arange(first, device=selected.device).expand(*selected.shape[:3], first)
            selected = torch.cat([always, selected + first], -1)
        return assignment, selected

    def _first_ordinary(self, grid: tuple[int, ...], key_grid: tuple[int, ...] | None) -> int:
        """How many tokens at the start stand outside the groups."""
        if not self.global_tokens:
            return 0
        if len(grid) != 1 or key_grid is not None or grid[0] <= self.global_tokens:
            raise ValueError(
                f"x must have a 1-dimensional grid of more than global_tokens={self.global_tokens} tokens, "
                f"and context be None, "
                f"got grid {grid} and {'no context' if key_grid is None else f'a context of grid {key_grid}'}"
            )
        return self.global_tokens
