"""Long short distance attention: groups of neighbours in even blocks, groups of tokens far apart in odd ones.

CrossFormer, arXiv 2108.00154 (ICLR 2022), section 3.2; CrossFormer++, arXiv 2303.06908 (TPAMI 2023). Short distance: a
group is `group_size` neighbours along each axis. Long distance with interval I: a group is `group_size` tokens that lie
I apart. Token t of an axis is number (t div I) among those of the same t mod I, so a grid seen as (tokens div I, I)
along each axis is cut into plain windows, of one residue each (`Groups`).

    x (batch, *grid, dim) -> groups (batch, groups, group tokens, dim) -> attention inside them -> (batch, *grid, dim)

The dynamic position bias is a small network from the offset between two tokens of a group, counted in tokens of the
group, to a bias of each head's logit. It is an option, off by default, so that a backbone has the same parameters with
any mechanism. In inference it is computed once and kept.

What the authors' two code bases (cheerss/CrossFormer) do at a grid that the groups do not divide, here as options:
`interval`, a number as in their newer code or "growing" as in the older one, and `small_grids`. Padding takes part in
neither, there by an additive mask, here too where a device has no kernel for ragged groups.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coterie.attention._kept import Keeper
from coterie.attention._windows import Windows
from coterie.attention.base import GridAttention, check_choice, check_int, exact_attention, register_attention
from coterie.ops._dispatch import Call
from coterie.ops._state import autocasting, exporting
from coterie.ops.biased_group_attention import BIASED_GROUP_ATTENTION, biased_group_attention

KERNEL_TOKENS = 256  # larger groups are left to scaled_dot_product_attention, which goes through keys in blocks
GROWING = "growing"
SMALL_GRIDS = ("axes", "shorter_side")


@dataclass(frozen=True)
class Groups:
    """How a grid is cut: along each axis, groups of `size` tokens that are `interval` apart."""

    grid: tuple[int, ...]
    size: tuple[int, ...]
    interval: tuple[int, ...]

    @property
    def padded(self) -> tuple[int, ...]:
        """The grid after padding: whole groups of every residue."""
        return tuple(-(-n // (s * i)) * s * i for n, s, i in zip(self.grid, self.size, self.interval))

    @property
    def windows(self) -> Windows:
        """The same cut as windows of a grid with two axes, (tokens div interval, tokens mod interval), for each."""
        axes = [axis for n, i in zip(self.padded, self.interval) for axis in (n // i, i)]
        sizes = [size for s in self.size for size in (s, 1)]
        return Windows(tuple(axes), tuple(sizes), (0,) * len(axes))

    def split(self, x: Tensor) -> Tensor:
        """(batch, *grid, channels) to (batch, groups, group tokens, channels), with zeros where there is no token."""
        spare = [p - n for p, n in zip(self.padded, self.grid)]
        if any(spare):
            x = F.pad(x, [0, 0, *(n for amount in reversed(spare) for n in (0, amount))])
        windows = self.windows
        return windows.split(x.reshape(x.shape[0], *windows.grid, x.shape[-1]), 1)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        x = self.windows.join(x, 1).reshape(x.shape[0], *self.padded, x.shape[-1])
        for axis, size in enumerate(self.grid):
            x = x.narrow(1 + axis, 0, size)
        return x

    def tokens(self) -> Int[Tensor, "groups group_tokens"]:
        """The tokens of every group, in raster order of the grid; -1 where there is none. On the CPU."""
        number = torch.arange(1, prod(self.grid) + 1, device="cpu").reshape(1, *self.grid, 1)
        return self.split(number)[0, ..., 0] - 1

    def real(
        self, mask: Bool[Tensor, " batch *grid"] | None, device: torch.device
    ) -> Bool[Tensor, "batch_or_1 groups tokens"] | None:
        """Where there is a real token in a group, or None if everywhere."""
        if mask is None and self.padded == self.grid:
            return None
        mask = torch.ones(1, *self.grid, dtype=torch.bool, device=device) if mask is None else mask
        return self.split(mask.unsqueeze(-1)).squeeze(-1)


@lru_cache(maxsize=64)
def _kept_tokens(groups: Groups) -> Int[Tensor, "groups group_tokens"]:
    with torch.inference_mode(False):  # a training step may want to save it
        return groups.tokens()


class DynamicPositionBias(Keeper):
    """A bias for every head and offset: Linear, then 3 x (LN, ReLU, Linear), without residuals.

    Args:
        hidden_dim: channels between the layers; a sixteenth of the tokens' in the authors' code.
        num_heads: biases for each offset.
        axes: of the grid.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        axes: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pos_proj = nn.Linear(axes, hidden_dim, **dd)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(hidden_dim, **dd), nn.ReLU(), nn.Linear(hidden_dim, out, **dd))
            for out in (hidden_dim, hidden_dim, num_heads)
        )

    def table(self, size: tuple[int, ...]) -> Float[Tensor, "*offsets heads"]:
        """The biases of all offsets 1 - n, ..., n - 1 along each axis of n tokens."""
        weight = self.pos_proj.weight
        axes = [torch.arange(1 - n, n, device=weight.device, dtype=weight.dtype) for n in size]
        offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))

    def forward(self, size: tuple[int, ...]) -> Float[Tensor, "heads tokens tokens"]:
        """The bias of every pair of tokens of a group of this size; in inference computed once and kept."""
        return self.kept(size, lambda: self._bias(size))

    def _bias(self, size: tuple[int, ...]) -> Float[Tensor, "heads tokens tokens"]:
        table = self.table(size)
        axes = [torch.arange(n, device=table.device) for n in size]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (tokens, axes)
        offset = place[:, None] - place[None, :]
        row = torch.zeros_like(offset[..., 0])
        for axis, n in enumerate(size):
            row = row * (2 * n - 1) + offset[..., axis] + n - 1
        return table.flatten(0, -2)[row].permute(2, 0, 1).contiguous()


@register_attention("long_short_distance")
class LongShortDistanceAttention(GridAttention):
    """Attention inside groups: of neighbours in blocks with an even `block_index`, of tokens far apart in odd ones.

    Args:
        dim, num_heads, and the keywords of GridAttention.
        group_size: tokens along each axis of a group, one number for all axes or one per axis.
        interval: how far apart the tokens of a long-distance group are: one number for all axes, or one per axis, and
            then a grid longer than `group_size` x `interval` has several such groups side by side; or "growing", for
            as much as makes one group span the grid. The same where grid = `group_size` x `interval`.
        block_index: which block of its stage this is.
        dynamic_position_bias: add the learned bias per head and offset to the logits. It is made for the axes of
            `group_size` (two where that is one number), and other grids are then refused.
        small_grids: an axis no longer than a group is one group in every block. With "axes" each axis goes by itself.
            "shorter_side" is the authors' rule: if any axis is that short, the grid is cut into groups of neighbours
            that are as long as the shortest axis. The same for square grids.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group_size: int | Sequence[int] = 7,
        interval: int | Sequence[int] | str = GROWING,
        block_index: int = 0,
        dynamic_position_bias: bool = False,
        small_grids: str = "axes",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        self.group_size = _sizes("group_size", group_size)
        if isinstance(interval, str):
            check_choice("interval", interval, (GROWING,))
        self.interval = None if isinstance(interval, str) else _sizes("interval", interval)
        if self.interval is not None and 1 < len(self.interval) != len(self.group_size) > 1:
            raise ValueError(f"interval must have as many axes as group_size {group_size}, got {interval}")
        check_int("block_index", block_index, 0)
        check_choice("small_grids", small_grids, SMALL_GRIDS)
        self.long_distance, self.small_grids = block_index % 2 == 1, small_grids
        self.pos: DynamicPositionBias | None = None
        if dynamic_position_bias:
            if isinstance(group_size, int):
                self.group_size = self.group_size * 2
            hidden = max(4, dim // 16)
            self.pos = DynamicPositionBias(hidden, num_heads, len(self.group_size), device=device, dtype=dtype)

    def mix(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Tensor | None,
        *,
        mask: Bool[Tensor, " batch *grid"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch *grid dim"]:
        grid = tuple(x.shape[1:-1])
        if mask is None or not self._goes_by_extent(grid):
            return self._in_groups(x, mask, self.groups(grid))
        images: dict[Groups, list[int]] = defaultdict(list)  # every image is cut as it would be without its padding
        for image, extent in enumerate(_extents(mask)):
            images[self.groups(grid, extent)].append(image)
        if len(images) == 1:
            return self._in_groups(x, mask, next(iter(images)))
        parts = [self._in_groups(x[rows], mask[rows], groups) for groups, rows in images.items()]
        order = torch.tensor([row for rows in images.values() for row in rows], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def groups(self, grid: tuple[int, ...], extent: tuple[int, ...] | None = None) -> Groups:
        """How this block cuts a grid; with an `extent` as it would cut the grid's first so many tokens of each axis."""
        extent = grid if extent is None else extent
        sizes, intervals = self._along(grid)
        as_square = self.small_grids == "shorter_side" and any(n <= size for n, size in zip(extent, sizes))
        if as_square:
            sizes = (min(extent),) * len(grid)
        if as_square or not self.long_distance:
            intervals = (1,) * len(grid)
        elif self.interval is None:
            intervals = tuple(-(-n // size) for n, size in zip(extent, sizes))
        else:
            intervals = tuple(1 if n <= size else i for n, size, i in zip(extent, sizes, intervals))
        return Groups(grid, tuple(min(s, -(-n // i)) for n, s, i in zip(grid, sizes, intervals)), intervals)

    def extra_repr(self) -> str:
        kind = f"long distance, interval={self.interval or GROWING}" if self.long_distance else "short distance"
        return f"{super().extra_repr()}, group_size={self.group_size}, {kind}"

    def _along(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Size and interval of the groups along each axis, before they are fitted to the grid."""
        axes = max(len(self.group_size), len(self.interval or ()))
        if axes != len(grid) and (axes != 1 or self.pos is not None):
            raise ValueError(f"x must have a {axes}-dimensional grid, as group_size={self.group_size}, got grid {grid}")
        sizes, intervals = self.group_size, self.interval or (1,)
        return sizes * (len(grid) // len(sizes)), intervals * (len(grid) // len(intervals))

    def _goes_by_extent(self, grid: tuple[int, ...]) -> bool:
        """Whether padding could make this block cut the image in it differently: then its extent is looked at."""
        sizes, intervals = self._along(grid)
        if self.small_grids == "shorter_side":
            return True
        one_kind = not self.long_distance or (self.interval is not None and max(intervals) == 1)
        return not one_kind and any(n > size for n, size in zip(grid, sizes))

    def _in_groups(
        self, x: Float[Tensor, "batch *grid dim"], mask: Bool[Tensor, " batch *grid"] | None, groups: Groups
    ) -> Float[Tensor, "batch *grid dim"]:
        batch = len(x)
        if self._kernel_serves(x, groups):
            return self._where_they_lie(x, mask, groups)
        query, key, value = self.project(groups.split(x).flatten(0, 1))
        query, scale = self.scaled(query)
        bias = None if self.pos is None else self.pos(groups.size).unsqueeze(0)
        real = groups.real(mask, x.device)
        if real is not None:
            real = real.expand(batch, -1, -1).flatten(0, 1)[:, None, None]
        y = exact_attention(query, key, value, allowed=real, bias=bias, scale=scale)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return self.proj_drop(groups.join(y.unflatten(0, (batch, -1))))

    def _kernel_serves(self, x: Tensor, groups: Groups) -> bool:
        plain = self.similarity == "dot" and type(self.q_norm) is type(self.k_norm) is nn.Identity
        if not plain or x.device.type != "cpu" or prod(groups.size) > KERNEL_TOKENS:
            return False
        call = Call("cpu", x.dtype, self.head_dim, exporting=exporting() or autocasting("cpu"))
        return BIASED_GROUP_ATTENTION.choose("auto", call) == "cpu"

    def _where_they_lie(
        self, x: Float[Tensor, "batch *grid dim"], mask: Bool[Tensor, " batch *grid"] | None, groups: Groups
    ) -> Float[Tensor, "batch *grid dim"]:
        """The same, by the kernel that takes the tokens of a group from all over the grid: no padding, no copies."""
        ordinary = type(x) is Tensor and not torch.compiler.is_compiling()  # else not one to be kept
        tokens = _kept_tokens(groups) if ordinary else groups.tokens()
        qkv = self.qkv(x).view(len(x), -1, 3, self.num_heads, self.head_dim)
        bias = None if self.pos is None else self.pos(groups.size).to(qkv.dtype)
        key_mask = None if mask is None else mask.flatten(1)
        y = biased_group_attention(qkv, tokens, bias, key_mask=key_mask, scale=self.scale)
        return self.proj_drop(self.proj(y.view(x.shape)))


def _extents(mask: Bool[Tensor, " batch *grid"]) -> list[tuple[int, ...]]:
    """For each image, how many tokens of each axis there are up to its last real one; at least one."""
    axes = range(1, mask.ndim)
    along = []
    for axis in axes:
        others = [a for a in axes if a != axis]
        some = mask.any(others) if others else mask  # (batch, tokens of the axis)
        number = torch.arange(1, mask.shape[axis] + 1, device=mask.device)
        along.append((some * number).amax(1).clamp(min=1))
    return [tuple(extent) for extent in torch.stack(along, 1).tolist()]


def _sizes(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, Sequence) else (value,)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name} must be one number, or one per axis of a 1-, 2- or 3-dimensional grid, got {value!r}")
    for size in sizes:
        check_int(name, size)
    return sizes
