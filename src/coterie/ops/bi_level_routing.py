"""Bi-level routing attention: each region of the image chooses the regions that concern it, and its tokens attend to
all tokens of those.

BiFormer, arXiv 2303.08810 (CVPR 2023), section 3.2. With queries q_i, keys k_i, values v_i on a grid that is cut into S
x S regions, and q'_r, k'_r the means of region r over its tokens, all heads together:

    routing     I_r = the top_k regions s of largest <q'_r, k'_s>                  (no gradient)
    attention   y_i = softmax over the tokens j of I_r(i) of (scale <q_i, k_j>), applied to their values

Routing and dynamic groups are the same relation, "the queries of this group attend to those keys": a region is a group,
and the tokens of its chosen regions are its keys. So the arithmetic is `grouped_attention` with its own backward, which
keeps no copy of keys and values for every region that chose them; memory is linear in the tokens. The number of regions
is fixed: a larger image has larger regions, and a query more keys.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.ops import _checks as check
from coterie.ops._dispatch import Call, Operation, register
from coterie.ops._state import autocasting
from coterie.ops.dynamic_group.api import GROUPED_ATTENTION, grouped_attention

PARTITIONS = ("balanced", "ceil")


def bi_level_routing_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    grid: tuple[int, int],
    *,
    regions: int = 7,
    top_k: int = 4,
    partition: str = "balanced",
    key_mask: Bool[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Attention of every token to the tokens of the regions that its own region has chosen.

    The gradient reaches query, key and value through the softmax only; the choice of regions has none. With `top_k` =
    all regions it is `scaled_dot_product_attention`.

    Args:
        query, key: (batch, heads, tokens, head_dim), tokens in the raster order of `grid`.
        value: (batch, heads, tokens, value_dim).
        grid, regions, top_k, partition: see `region_routing`.
        key_mask: (batch, tokens), True where a token is real; others are no keys and count in no mean. A query without
            any key gets zeros.
        scale: factor of the scores; head_dim ** -0.5 if None.
        backend: "auto", "cpu", "triton", "native" or "reference", of `grouped_attention`.

    Returns:
        (batch, heads, tokens, value_dim).

    Raises:
        ValueError, TypeError: arguments that do not fit, a backend that is unknown or cannot serve the call.
    """
    cut = _check(query, key, grid, regions, top_k, partition, key_mask)
    check.check_tensor(_OP, "value", value, "batch heads tokens value_dim")
    check.check_same(_OP, "(batch, heads, tokens)", "key and value", key.shape[:3], value.shape[:3])
    check.check_scale(_OP, scale)
    backend = GROUPED_ATTENTION.choose(backend, Call.of(query, key, value))
    if top_k == cut.count and (partition == "balanced" or cut.even(None)):
        return _exact(query, key, value, key_mask, scale)
    assignment, selected = _route(query, key, cut, top_k, key_mask)
    if not cut.even(key_mask):  # room for the numbers of no token; only in the authors' way do they take part
        spare = selected.shape[-1]
        key, value = F.pad(key, (0, 0, 0, spare)), F.pad(value, (0, 0, 0, spare))
        if key_mask is None and partition == "balanced":
            key_mask = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        if key_mask is not None:
            key_mask = F.pad(key_mask, (0, spare), value=partition == "ceil")
    return grouped_attention(query, key, value, assignment, selected, key_mask=key_mask, scale=scale, backend=backend)


def region_routing(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    grid: tuple[int, int],
    *,
    regions: int = 7,
    top_k: int = 4,
    partition: str = "balanced",
    key_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Int[Tensor, "batch heads tokens"], Int[Tensor, "batch heads regions selected"]]:
    """The region of every token, and the keys of every region. Not differentiable; the same for all heads.

    Computed at least in float32, ties going to the lower region, because a choice that flips changes whole regions.

    Args:
        query, key: (batch, heads, tokens, head_dim), tokens in the raster order of `grid`.
        grid: rows and columns.
        regions: S, regions along each axis.
        top_k: regions that each region chooses.
        partition: how a side that S does not divide is cut. "balanced": into S regions whose sizes differ by one at
            most. "ceil": into regions of side // S, the last of which may be partly outside (the authors' refactored
            code); there are more than S then, and zeros outside take part as keys.
        key_mask: (batch, tokens), True where a token is real. "balanced" then cuts each image by itself, up to its last
            row and column that hold a real token, so that it does not matter how much padding follows. A region
            without real tokens is chosen last.

    Returns:
        assignment (batch, heads, tokens) int64 and selected (batch, heads, regions, top_k * tokens of a region) int64.
        Where regions are not of one size, or there is a mask, numbers from `tokens` on stand for no token, each once
        in a row.

    Raises:
        ValueError: a side of the grid below `regions`, `top_k` above the number of regions, and shapes that do not fit.
    """
    cut = _check(query, key, grid, regions, top_k, partition, key_mask)
    return _route(query, key, cut, top_k, key_mask)


Length = int | Int[Tensor, "batch one"]


@dataclass(frozen=True)
class _Axis:
    """One side of the grid: how many regions of at most how many tokens. Methods take the length to cut: that of the
    grid, or one of each image (batch, 1), which then is the first dimension of what they return."""

    size: int
    count: int
    width: int
    balanced: bool

    @classmethod
    def cut(cls, size: int, regions: int, partition: str) -> "_Axis":
        if partition == "balanced":
            return cls(size, regions, -(-size // regions), True)
        width = size // regions
        return cls(size, -(-size // width), width, False)

    def members(self, length: Length, device: torch.device) -> Int[Tensor, "*batch size"]:
        """The region of each position; beyond the length it is the last one."""
        position = torch.arange(self.size, device=device)
        return (position * self.count // length).clamp(max=self.count - 1) if self.balanced else position // self.width

    def slots(
        self, length: Length, device: torch.device
    ) -> tuple[Int[Tensor, "*batch count width"], Bool[Tensor, "*batch count width"]]:
        """The positions of each region, and which of them exist."""
        number = torch.arange(self.count + 1, device=device)
        if self.balanced:
            edges = (number * length + self.count - 1) // self.count
        else:
            edges = (number * self.width).clamp(max=self.size)
        position = edges[..., :-1, None] + torch.arange(self.width, device=device)
        return position, position < edges[..., 1:, None]


@dataclass(frozen=True)
class _Cut:
    """A grid in regions."""

    rows: _Axis
    columns: _Axis

    @property
    def count(self) -> int:
        return self.rows.count * self.columns.count

    def even(self, mask: Tensor | None) -> bool:
        """Whether all regions have the same number of tokens, whatever the images are."""
        places = self.count * self.rows.width * self.columns.width
        return places == self.rows.size * self.columns.size and not (self.rows.balanced and mask is not None)

    def lengths(self, mask: Bool[Tensor, "batch tokens"] | None) -> tuple[Length, Length]:
        """Rows and columns to cut: all, or up to the last real one of each image."""
        if mask is None or not self.rows.balanced:
            return self.rows.size, self.columns.size
        grid = mask.unflatten(1, (self.rows.size, self.columns.size))
        down, across = (
            (torch.arange(1, real.shape[1] + 1, device=mask.device) * real).amax(1, keepdim=True).clamp(min=1)
            for real in (grid.any(2), grid.any(1))
        )
        return down, across

    def members(self, lengths: tuple[Length, Length], device: torch.device) -> Int[Tensor, "*batch tokens"]:
        """The region of each token."""
        rows, columns = self.rows.members(lengths[0], device), self.columns.members(lengths[1], device)
        return (rows.unsqueeze(-1) * self.columns.count + columns.unsqueeze(-2)).flatten(-2)

    def tokens(self, lengths: tuple[Length, Length], device: torch.device) -> Int[Tensor, "*batch regions width"]:
        """The tokens of each region; places beyond them hold -1."""
        row, in_rows = self.rows.slots(lengths[0], device)
        column, in_columns = self.columns.slots(lengths[1], device)
        token = row[..., :, None, :, None] * self.columns.size + column[..., None, :, None, :]
        exists = in_rows[..., :, None, :, None] & in_columns[..., None, :, None, :]
        return torch.where(exists, token, -1).flatten(-2).flatten(-3, -2)

    def means(self, x: Float[Tensor, "batch heads tokens head_dim"]) -> Float[Tensor, "batch regions dim"]:
        """The mean of each region over its tokens, heads side by side, where regions are even."""
        rows, columns = self.rows, self.columns
        tokens = x.transpose(1, 2).flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        strips = tokens.unflatten(1, (rows.count, rows.width, columns.size)).sum(2)
        sums = strips.unflatten(2, (columns.count, columns.width)).sum(3)
        return sums.flatten(1, 2) / (rows.width * columns.width)

    def real_means(
        self,
        x: Float[Tensor, "batch heads tokens head_dim"],
        real: Bool[Tensor, "#batch tokens"],
        lengths: tuple[Length, Length],
    ) -> tuple[Float[Tensor, "batch regions dim"], Bool[Tensor, "#batch regions"]]:
        """The mean of each region over its real tokens, zero where there are none; and where there are none."""
        tokens = x.transpose(1, 2).flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        count = self._sums(real.unsqueeze(-1).to(tokens.dtype), lengths)
        sums = self._sums(tokens.masked_fill(~real.unsqueeze(-1), 0.0), lengths)
        return sums / count.clamp(min=1.0), count.squeeze(-1) == 0

    def _sums(
        self, tokens: Float[Tensor, "batch tokens dim"], lengths: tuple[Length, Length]
    ) -> Float[Tensor, "batch regions dim"]:
        """Sums over regions, as products with matrices of zeros and ones: in a fixed order on every device."""
        rows, columns, device = self.rows, self.columns, tokens.device
        down = F.one_hot(rows.members(lengths[0], device), rows.count).transpose(-1, -2).to(tokens.dtype)
        across = F.one_hot(columns.members(lengths[1], device), columns.count).transpose(-1, -2).to(tokens.dtype)
        strips = down @ tokens.reshape(tokens.shape[0], rows.size, -1)
        return (across.unsqueeze(-3) @ strips.unflatten(-1, (columns.size, -1))).flatten(1, 2)


def _route(
    query: Tensor, key: Tensor, cut: _Cut, top_k: int, key_mask: Tensor | None
) -> tuple[Int[Tensor, "batch heads tokens"], Int[Tensor, "batch heads regions selected"]]:
    device, (batch, heads, tokens) = query.device, query.shape[:3]
    autocast = autocasting(device.type)
    with torch.no_grad(), torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        lengths, even = cut.lengths(key_mask), cut.even(key_mask)
        if even and key_mask is None:
            affinity = cut.means(query) @ cut.means(key).transpose(-1, -2)
        else:
            real = torch.ones(1, tokens, dtype=torch.bool, device=device) if key_mask is None else key_mask
            (of_query, _), (of_key, nobody) = (cut.real_means(x, real, lengths) for x in (query, key))
            affinity = (of_query @ of_key.transpose(-1, -2)).masked_fill(nobody.unsqueeze(1), float("-inf"))
        order = affinity.sort(dim=-1, descending=True, stable=True).indices
        chosen = order[..., :top_k].sort(dim=-1).values
        places = cut.tokens(lengths, device)
        if places.ndim == 2:
            selected = places[chosen].flatten(2)
        else:  # every image has its own regions
            image = torch.arange(batch, device=device)[:, None, None]
            selected = places[image, chosen].flatten(2)
        if not even:
            nowhere = torch.arange(tokens, tokens + selected.shape[-1], device=device)
            selected = torch.where(selected < 0, nowhere, selected)
    assignment = cut.members(lengths, device).expand(batch, tokens).unsqueeze(1).expand(-1, heads, -1)
    return assignment, selected.unsqueeze(1).expand(-1, heads, -1, -1)


def _exact(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float | None) -> Tensor:
    if key_mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    some = key_mask.any(-1)[:, None, None, None]
    allowed = key_mask[:, None, None] | ~some
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=scale).masked_fill(~some, 0.0)


def _check(
    query: Any, key: Any, grid: tuple[int, int], regions: int, top_k: int, partition: str, key_mask: Any
) -> _Cut:
    check.check_tensor(_OP, "query", query, "batch heads tokens head_dim")
    check.check_tensor(_OP, "key", key, "batch heads tokens head_dim")
    check.check_same(_OP, "shape", "query and key", query.shape, key.shape)
    check.check_same(_OP, "dtype", "query and key", query.dtype, key.dtype)
    check.check_key_mask(_OP, key_mask, query.shape[0], key.shape[2], query.device)
    if len(grid) != 2 or grid[0] * grid[1] != query.shape[2]:
        raise ValueError(f"{_OP}: grid must be (rows, columns) of {query.shape[2]} tokens, got {tuple(grid)}")
    if partition not in PARTITIONS:
        raise ValueError(f"{_OP}: partition must be one of {', '.join(map(repr, PARTITIONS))}, got {partition!r}")
    check_regions(regions, top_k, _OP)
    if min(grid) < regions:
        raise ValueError(
            f"{_OP}: grid must have at least regions={regions} tokens along each side, got {grid[0]} x {grid[1]}: "
            f"use a larger image or fewer regions"
        )
    return _Cut(_Axis.cut(grid[0], regions, partition), _Axis.cut(grid[1], regions, partition))


def check_regions(regions: Any, top_k: Any, where: str) -> None:
    """`top_k` of `regions` x `regions` regions can be chosen, or an error that names both."""
    check.check_positive_int(where, "regions", regions)
    check.check_positive_int(where, "top_k", top_k)
    if top_k > regions * regions:
        raise ValueError(
            f"{where}: top_k must be at most the number of regions, "
            f"regions x regions = {regions} x {regions} = {regions * regions}, got {top_k}"
        )


def _describe(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Call:
    return Call.of(query, key, value)


_OP = register(Operation("bi_level_routing_attention", GROUPED_ATTENTION.backends, _describe)).name
