"""Shifted-window attention: tokens attend inside windows, and every second block shifts the windows by half.

Swin Transformer, arXiv 2103.14030, section 3.2, on 1-, 2- and 3-dimensional grids. Differences from the authors' code:
the padding of a grid that the windows do not divide takes no part in attention (there it does; `uneven`), and the
relative position bias is an option, off by default, so that a backbone has the same parameters with any mechanism. With
`shift_size=0` it is the window attention of DaViT (arXiv 2204.03645).

A mask keeps padding out, and a padded grid is cut where the grid alone would be; with one exception: an axis that one
window covers does not shift, so a grid that fits into one window is cut differently once padding makes it larger.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.attention._windows import GROUPED_TOKENS, Windows, window_attention
from coterie.attention.base import GridAttention, check_choice, check_int, register_attention
from coterie.ops._dispatch import Call
from coterie.ops._state import autocasting, exporting
from coterie.ops.biased_group_attention import BIASED_GROUP_ATTENTION, biased_group_attention

UNEVEN = ("masked", "padded_input")


@register_attention("shifted_window")
class ShiftedWindowAttention(GridAttention):
    """Attention inside (shifted) windows.

    Args:
        dim, num_heads, and the keywords of GridAttention.
        window_size: tokens along each axis of a window, one number for all axes or one per axis. A window larger than
            the grid is the grid.
        shift_size: by how much the blocks with an odd `block_index` shift their windows; half a window when None.
        block_index: which block of its stage this is: even ones do not shift.
        relative_position_bias: add Swin's learned bias per head and relative position to the logits. The table is made
            for the axes of `window_size` (two axes where that is one number), and other grids are then refused.
        uneven: what to do where windows do not divide the grid. "masked": windows at the border are smaller.
            "padded_input" is the authors' way, and DaViT's: zeros behind the last token of each axis of the input take
            part in attention, with the biases as their keys and values; released models are trained with it.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int | Sequence[int] = 7,
        shift_size: int | Sequence[int] | None = None,
        block_index: int = 0,
        relative_position_bias: bool = False,
        uneven: str = "masked",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        self.window_size = _sizes("window_size", window_size, 1)
        if shift_size is None:
            self.shift_size = tuple(w // 2 for w in self.window_size)
        else:
            self.shift_size = _sizes("shift_size", shift_size, 0)
            if len(self.shift_size) not in (1, len(self.window_size)) and len(self.window_size) != 1:
                raise ValueError(f"shift_size must have as many axes as window_size {window_size}, got {shift_size}")
            largest = self.window_size * (len(self.shift_size) if len(self.window_size) == 1 else 1)
            if any(s >= w for s, w in zip(self.shift_size, largest)):
                raise ValueError(f"shift_size must be smaller than window_size {window_size}, got {shift_size}")
        check_int("block_index", block_index, 0)
        check_choice("uneven", uneven, UNEVEN)
        self.uneven = uneven
        self.shifts = block_index % 2 == 1
        self.relative_position_bias_table: nn.Parameter | None = None
        if relative_position_bias:
            if len(self.window_size) == 1 and isinstance(window_size, int):
                self.window_size, self.shift_size = self.window_size * 2, self.shift_size * (2 // len(self.shift_size))
            rows = 1
            for size in self.window_size:
                rows *= 2 * size - 1
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads, device=device, dtype=dtype))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def mix(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Tensor | None,
        *,
        mask: Bool[Tensor, " batch *grid"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch *grid dim"]:
        grid = tuple(x.shape[1:-1])
        spare = [-size % window for size, window in zip(grid, self._along(grid)[0])]
        if self.uneven == "masked" or not any(spare):
            return self._in_windows(x, context, mask, is_causal)
        behind = [amount for size in reversed(spare) for amount in (0, size)]
        mask = None if mask is None else F.pad(mask, behind, value=True)
        y = self._in_windows(F.pad(x, [0, 0, *behind]), context, mask, is_causal)
        for axis, size in enumerate(grid):
            y = y.narrow(1 + axis, 0, size)
        return y

    def _in_windows(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Tensor | None,
        mask: Bool[Tensor, " batch *grid"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch *grid dim"]:
        """Attention with its projections. With a bias, on the CPU, a kernel takes queries, keys and values where the
        projection has left them: no window is cut out, padded or put back."""
        windows = self.windows(tuple(x.shape[1:-1]))
        if not self._kernel_serves(x, windows):
            return super().mix(x, context, mask=mask, is_causal=is_causal)
        _, tokens, ragged = windows.groups(x.device)
        if ragged:  # places without a token
            tokens = tokens.masked_fill(tokens >= prod(windows.grid), -1)
        qkv = self.qkv(x).view(len(x), -1, 3, self.num_heads, self.head_dim)
        key_mask = None if mask is None else mask.flatten(1)
        y = biased_group_attention(qkv, tokens, self._bias(windows), key_mask=key_mask, scale=self.scale)
        return self.proj_drop(self.proj(y.view(x.shape)))

    def _kernel_serves(self, x: Tensor, windows: Windows) -> bool:
        unchanged = all(isinstance(norm, nn.Identity) for norm in (self.q_norm, self.k_norm))
        if self.relative_position_bias_table is None or self.similarity != "dot" or not unchanged:
            return False
        if prod(windows.window) > GROUPED_TOKENS:
            return False
        call = Call(x.device.type, x.dtype, self.head_dim, exporting=exporting() or autocasting(x.device.type))
        return BIASED_GROUP_ATTENTION.choose("auto", call) == "cpu"

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
        query, scale = self.scaled(query)
        windows = self.windows(grid)
        return window_attention(query, key, value, windows, mask=mask, bias=self._bias(windows), scale=scale)

    def windows(self, grid: tuple[int, ...]) -> Windows:
        """How this block cuts a grid."""
        window, shift = self._along(grid)
        return Windows.fit(grid, window, shift if self.shifts else (0,) * len(grid))

    def _along(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and shift along each axis, before they are fitted to the grid."""
        dims, axes = len(grid), len(self.window_size)
        if axes != dims and (axes != 1 or self.relative_position_bias_table is not None):
            raise ValueError(
                f"x must have a {axes}-dimensional grid, as window_size={self.window_size}, got grid {grid}"
            )
        window, shift = (sizes * (dims // len(sizes)) for sizes in (self.window_size, self.shift_size))
        return window, shift

    def no_weight_decay(self) -> set[str]:
        table = set() if self.relative_position_bias_table is None else {"relative_position_bias_table"}
        return super().no_weight_decay() | table

    def extra_repr(self) -> str:
        shift = self.shift_size if self.shifts else 0
        return f"{super().extra_repr()}, window_size={self.window_size}, shift={shift}"

    def _bias(self, windows: Windows) -> Float[Tensor, "heads window_tokens window_tokens"] | None:
        if self.relative_position_bias_table is None:
            return None
        table = self.relative_position_bias_table
        axes = [torch.arange(used, device=table.device) for used in windows.window]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # (window tokens, axes)
        offset = place[:, None] - place[None, :]
        row = torch.zeros_like(offset[..., 0])
        for axis, size in enumerate(self.window_size):
            row = row * (2 * size - 1) + offset[..., axis] + size - 1
        return table[row].permute(2, 0, 1)


def _sizes(name: str, value: int | Sequence[int], least: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name} must be one number, or one per axis of a 1-, 2- or 3-dimensional grid, got {value!r}")
    for size in sizes:
        check_int(name, size, least)
    return sizes
