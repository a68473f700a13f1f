"""Cross-shaped window attention: half of the heads attend inside horizontal stripes, the others inside vertical ones.

CSWin Transformer, arXiv 2107.00652, section 3.2. Two-dimensional grids only: the cross is made of rows and columns.
Differences from the authors' code: a grid that the stripes do not divide is padded and the padding takes no part in
attention (there, it cannot be run); the locally-enhanced position encoding (LePE) is an option, off by default, so that
a backbone has the same parameters with any mechanism; with an odd number of heads the horizontal half has one more, and
a single head alternates with `block_index`.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.attention._windows import Windows, window_attention
from coterie.attention.base import GridAttention, check_int, register_attention


@register_attention("cross_shaped_window")
class CrossShapedWindowAttention(GridAttention):
    """Attention inside horizontal and vertical stripes of a 2-dimensional grid.

    Args:
        dim, num_heads, and the keywords of GridAttention.
        stripe_width: rows of a horizontal stripe and columns of a vertical one (the paper: 1, 2, 7, 7 in its four
            stages). A stripe wider than the grid is the grid.
        block_index: which block of its stage this is; only a single head goes by it.
        lepe: add a 3x3 depth-wise convolution of the values inside each stripe to the output (`lepe`, zero padding at
            its border).
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({2})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        stripe_width: int = 7,
        block_index: int = 0,
        lepe: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        check_int("stripe_width", stripe_width)
        check_int("block_index", block_index, 0)
        self.stripe_width = stripe_width
        self.horizontal_heads = (num_heads + 1) // 2 if num_heads > 1 else 1 - block_index % 2
        self.lepe: nn.Conv2d | None = None
        if lepe:
            self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

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
        height, width = grid
        outputs = []
        for heads, window in (
            (slice(0, self.horizontal_heads), (self.stripe_width, width)),
            (slice(self.horizontal_heads, self.num_heads), (height, self.stripe_width)),
        ):
            if heads.start == heads.stop:
                continue
            stripes = Windows.fit(grid, window, (0, 0))
            y = window_attention(query[:, heads], key[:, heads], value[:, heads], stripes, mask=mask, scale=scale)
            outputs.append(y if self.lepe is None else y + self._position(value[:, heads], stripes, mask, heads))
        return torch.cat(outputs, 1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stripe_width={self.stripe_width}, horizontal_heads={self.horizontal_heads}"

    def _position(
        self,
        value: Float[Tensor, "batch heads tokens head_dim"],
        stripes: Windows,
        mask: Bool[Tensor, "batch tokens"] | None,
        heads: slice,
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """The convolution of the values, stripe by stripe; padding counts as zero."""
        assert self.lepe is not None
        batch, count, _, head_dim = value.shape
        if mask is not None:
            value = value.masked_fill(~mask[:, None, :, None], 0.0)
        channels = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
        weight = self.lepe.weight[channels]
        bias = None if self.lepe.bias is None else self.lepe.bias[channels]
        parts = stripes.split(value.unflatten(2, stripes.grid), 2)
        images = parts.permute(0, 2, 1, 4, 3).reshape(-1, count * head_dim, *stripes.window)
        y = nn.functional.conv2d(images, weight, bias, padding=1, groups=count * head_dim)
        y = y.reshape(batch, parts.shape[2], count, head_dim, -1).permute(0, 2, 1, 4, 3)
        return stripes.join(y, 2).reshape(value.shape)
