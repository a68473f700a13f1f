"""Attention inside the windows of a 1-, 2- or 3-dimensional token grid, for any grid size.

A grid that the windows do not divide is padded at its end and the padding is masked, so windows at the border are
smaller ones; a window larger than the grid is the grid. With a shift s, an axis is cut at s, s + w, s + 2w, ...: the
two partial windows at its ends share one window's worth of work by a cyclic roll (Swin, arXiv 2103.14030, section 3.2)
and are kept apart by the mask.

A window is also a group of queries that attend to the same keys. On the CPU the kernel for such groups takes queries,
keys and values where they lie: nothing is cut out, put back or masked (`Windows.groups`).
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.attention.base import exact_attention
from coterie.ops._dispatch import Call
from coterie.ops.dynamic_group.api import GROUPED_ATTENTION, grouped_attention

GROUPED_TOKENS = 256  # larger windows are left to scaled_dot_product_attention, which goes through keys in blocks


@dataclass(frozen=True)
class Windows:
    """How a grid is cut: window and shift along each axis, already clipped to the grid."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]

    @classmethod
    def fit(cls, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> "Windows":
        """Clip windows to the grid; an axis that one window covers does not shift."""
        fitted = tuple(min(w, g) for w, g in zip(window, grid, strict=True))
        moved = tuple(0 if w >= g else s for w, g, s in zip(window, grid, shift, strict=True))
        return cls(tuple(grid), fitted, moved)

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows along each axis, the padded ones included."""
        return tuple(-(-g // w) for g, w in zip(self.grid, self.window))

    @property
    def padded(self) -> tuple[int, ...]:
        """The grid after padding."""
        return tuple(n * w for n, w in zip(self.counts, self.window))

    def split(self, x: Tensor, lead: int) -> Tensor:
        """(*lead, *grid, channels) to (*lead, windows, window tokens, channels): pad with zeros, roll, cut."""
        dims = len(self.grid)
        if self.padded != self.grid:
            spare = [p - g for p, g in zip(self.padded, self.grid)]
            x = F.pad(x, [0, 0, *(n for amount in reversed(spare) for n in (0, amount))])
        if any(self.shift):
            x = x.roll([-s for s in self.shift], list(range(lead, lead + dims)))
        interleaved = [size for pair in zip(self.counts, self.window) for size in pair]
        x = x.reshape(*x.shape[:lead], *interleaved, x.shape[-1])
        outer = [lead + 2 * i for i in range(dims)]
        inner = [lead + 2 * i + 1 for i in range(dims)]
        x = x.permute(*range(lead), *outer, *inner, x.ndim - 1)
        return x.reshape(*x.shape[:lead], prod(self.counts), prod(self.window), x.shape[-1])

    def join(self, x: Tensor, lead: int) -> Tensor:
        """The inverse of `split`: (*lead, windows, window tokens, channels) to (*lead, *grid, channels)."""
        dims = len(self.grid)
        x = x.reshape(*x.shape[:lead], *self.counts, *self.window, x.shape[-1])
        order = [lead + i + j * dims for i in range(dims) for j in (0, 1)]
        x = x.permute(*range(lead), *order, x.ndim - 1).reshape(*x.shape[:lead], *self.padded, x.shape[-1])
        if any(self.shift):
            x = x.roll(list(self.shift), list(range(lead, lead + dims)))
        for axis, size in enumerate(self.grid):
            x = x.narrow(lead + axis, 0, size)
        return x

    def membership(self, device: torch.device) -> Int[Tensor, "*grid"]:
        """For every token of the grid, the number of the window it belongs to (what attention inside windows means)."""
        number = torch.zeros((), dtype=torch.int64, device=device)
        for size, window, shift, count in zip(self.grid, self.window, self.shift, self.counts):
            along = torch.div(torch.arange(size, device=device) - shift, window, rounding_mode="floor") + 1
            number = number.unsqueeze(-1) * (count + 1) + along
        return number

    def groups(self, device: torch.device) -> tuple[Int[Tensor, " tokens"], Int[Tensor, "windows window_tokens"], bool]:
        """The window of every token and the tokens of every window, and whether some of these are none.

        Windows at the border are windows of their own here. A place without a token has a number from the number of
        tokens on, below that plus window tokens.
        """
        member = torch.zeros((), dtype=torch.int64, device=device)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        exists = torch.ones(1, 1, dtype=torch.bool, device=device)
        for size, window, shift in zip(self.grid, self.window, self.shift):
            first = shift - window if shift else 0
            count = -(-(size - first) // window)
            place = torch.arange(first, first + count * window, device=device).view(count, window)
            real = (place >= 0) & (place < size)
            along = torch.div(torch.arange(size, device=device) - first, window, rounding_mode="floor")
            member = member.unsqueeze(-1) * count + along
            token = (token[:, None, :, None] * size + place[:, None]).reshape(-1, token.shape[1] * window)
            exists = (exists[:, None, :, None] & real[:, None]).reshape(token.shape)
        ragged = self.padded != self.grid or any(self.shift)
        if ragged:
            token = torch.where(exists, token, prod(self.grid) + torch.arange(token.shape[1], device=device))
        return member.flatten(), token, ragged

    def allowed(self, mask: Bool[Tensor, " batch *grid"] | None, device: torch.device) -> Bool[Tensor, "..."] | None:
        """Who may attend to whom, (batch or 1, windows, window tokens, window tokens), or None where everybody may."""
        if self.padded == self.grid and not any(self.shift) and mask is None:
            return None
        member = self.split(self.membership(device)[..., None] + 1, 0)[..., 0]  # 0 is padding, a window of its own
        allowed = (member.unsqueeze(-1) == member.unsqueeze(-2)).unsqueeze(0)
        if mask is not None:
            real = self.split(mask[..., None].to(torch.uint8), 1)[..., 0].bool()
            allowed = allowed & real.unsqueeze(-2)
        return allowed


def window_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    windows: Windows,
    *,
    mask: Bool[Tensor, "batch tokens"] | None,
    bias: Float[Tensor, "heads window_tokens window_tokens"] | None = None,
    scale: float,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Softmax attention of every token to the real tokens of its own window."""
    if bias is None and _grouped_is_faster(query, key, value, windows):
        return _grouped(query, key, value, windows, mask, scale)
    batch, heads, _, head_dim = query.shape
    grid = windows.grid

    def split(x: Tensor) -> Tensor:
        parts = windows.split(x.unflatten(2, grid), 2)  # (batch, heads, windows, window tokens, head_dim)
        return parts.transpose(1, 2).flatten(0, 1)

    allowed = windows.allowed(None if mask is None else mask.unflatten(1, grid), query.device)
    if allowed is not None:
        allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    y = exact_attention(
        split(query),
        split(key),
        split(value),
        allowed=allowed,
        bias=None if bias is None else bias.unsqueeze(0),
        scale=scale,
    )
    y = y.unflatten(0, (batch, prod(windows.counts))).transpose(1, 2)
    return windows.join(y, 2).reshape(batch, heads, -1, head_dim)


def _grouped_is_faster(query: Tensor, key: Tensor, value: Tensor, windows: Windows) -> bool:
    if query.device.type != "cpu" or prod(windows.window) > GROUPED_TOKENS:
        return False
    return GROUPED_ATTENTION.choose("auto", Call.of(query, key, value)) == "cpu"


def _grouped(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    windows: Windows,
    mask: Bool[Tensor, "batch tokens"] | None,
    scale: float,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    batch, heads = query.shape[:2]
    member, tokens, ragged = windows.groups(query.device)
    if ragged:  # keys that stand for the places without a token
        spare = tokens.shape[1]
        mask = query.new_ones(batch, query.shape[2], dtype=torch.bool) if mask is None else mask
        key, value, mask = F.pad(key, (0, 0, 0, spare)), F.pad(value, (0, 0, 0, spare)), F.pad(mask, (0, spare))
    assignment, selected = member.expand(batch, heads, -1), tokens.expand(batch, heads, -1, -1)
    return grouped_attention(query, key, value, assignment, selected, key_mask=mask, scale=scale)
