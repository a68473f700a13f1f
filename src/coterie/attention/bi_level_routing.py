"""Bi-level routing attention: the tokens of a region attend to all tokens of the few regions that concern it.

BiFormer, arXiv 2303.08810 (CVPR 2023), section 3.2. A 2-dimensional grid is cut into `regions` x `regions` regions;
each chooses its `top_k` regions by mean query and mean key, all heads together and without gradient; attention to their
tokens is exact. A depth-wise convolution of the values (the paper's local context enhancement, `lepe` in the code) may
be added before the output projection.

    x (batch, rows, columns, dim) -> query, key, value (batch, heads, tokens, head_dim)
      -> chosen regions (batch, regions^2, top_k) -> output (batch, rows, columns, dim)

Differences from the authors' code (rayleizhu/BiFormer), each of which is an option: their logits are scaled by
dim^-0.5, not head_dim^-0.5 (`scale="dim"`); their last stage convolves the input, not the values (`lepe_of="input"`);
a grid that the regions do not divide is filled up with zeros that take part in everything (`uneven`), while here some
regions are one row or column larger and no padding exists. With a mask each image of a batch is cut into regions by
itself, up to its last real row and column, so that its result is what it would be alone. The convolution is off by
default, so that a backbone has the same parameters with any mechanism. What no released model uses is left out: keys
at lower resolution, a width of queries and keys of their own, and routing with parameters or gradients.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coterie.attention.base import GridAttention, check_choice, check_int, register_attention
from coterie.ops.bi_level_routing import bi_level_routing_attention, check_regions, region_routing

SCALES = ("head", "dim")
LEPE_SOURCES = ("value", "input")
UNEVEN = ("balanced", "padded_input", "padded_projection")


@register_attention("bi_level_routing")
class BiLevelRoutingAttention(GridAttention):
    """Attention of the tokens of a region to those of the regions it chooses.

    Args:
        dim, num_heads, and the keywords of GridAttention.
        regions: regions along each side of the grid (the paper: 7); a side needs at least as many tokens.
        top_k: regions that each region chooses (the paper: 1, 4, 16 and all in its four stages). With all, regions^2,
            this is exact global attention.
        lepe: size (odd) of the depth-wise convolution added to the output; 0 for none, the paper: 5.
        lepe_of: what it convolves: "value", or "input" (x), as the last stage of the released models does.
        scale: of the logits: "head" for head_dim^-0.5, or "dim" for dim^-0.5, as the released models have it.
        uneven: what to do where `regions` does not divide a side. "balanced": regions whose sides differ by one,
            without padding; the one to use with masks. "padded_input" and "padded_projection" are the authors' ways
            (`auto_pad` of their first code, and that of their refactored one): zeros behind the last row and column of
            the input, or of queries, keys and values, which take part in attention.
        backend: of `coterie.ops.grouped_attention`.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({2})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})
    operation: ClassVar[str] = "bi_level_routing_attention"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        regions: int = 7,
        top_k: int = 4,
        lepe: int = 0,
        lepe_of: str = "value",
        scale: str = "head",
        uneven: str = "balanced",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        check_regions(regions, top_k, type(self).__name__)
        check_int("lepe", lepe, 0)
        if lepe and lepe % 2 == 0:
            raise ValueError(f"lepe must be odd, or 0 for no convolution, got {lepe}")
        check_choice("lepe_of", lepe_of, LEPE_SOURCES)
        check_choice("scale", scale, SCALES)
        check_choice("uneven", uneven, UNEVEN)
        self.regions, self.top_k, self.lepe_of, self.uneven, self.backend = regions, top_k, lepe_of, uneven, backend
        if scale == "dim":
            self.scale = dim**-0.5
        self.lepe: nn.Conv2d | None = None
        if lepe:
            self.lepe = nn.Conv2d(dim, dim, lepe, padding=lepe // 2, groups=dim, device=device, dtype=dtype)

    def mix(
        self,
        x: Float[Tensor, "batch rows columns dim"],
        context: Tensor | None,
        *,
        mask: Bool[Tensor, "batch rows columns"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch rows columns dim"]:
        rows, columns = x.shape[1:3]
        x, mask = self._padded(x, mask)
        grid = (x.shape[1], x.shape[2])
        query, key, value = self.project(x)
        key_mask = None if mask is None else mask.flatten(1)
        y = self.attend(query, key, value, grid=grid, key_grid=None, mask=key_mask, is_causal=False)
        y = y.transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            source = x if self.lepe_of == "input" else value.transpose(1, 2).reshape(x.shape)
            y = y + self._local(source, mask)
        return self.proj_drop(self.proj(y[:, :rows, :columns]))

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
        return bi_level_routing_attention(
            query, key, value, (grid[0], grid[1]), key_mask=mask, scale=scale, backend=self.backend, **self._routing()
        )

    def groups_of(
        self,
        x: Float[Tensor, "batch rows columns dim"],
        context: None = None,
        *,
        mask: Bool[Tensor, "batch rows columns"] | None = None,
    ) -> tuple[Int[Tensor, "batch heads tokens"], Int[Tensor, "batch heads regions selected"]]:
        """Look at the regions that `forward` would choose: no gradient flows.

        Returns:
            assignment (batch, heads, tokens) int64, the region of each token, and selected (batch, heads, regions^2,
            keys) int64, the tokens of its chosen regions; where these are of different sizes, a row is filled up with
            its first token. The authors' zeros are left out.
        """
        self.check(x, context, mask=mask)
        rows, columns = x.shape[1:3]
        with torch.no_grad():
            x, mask = self._padded(x, mask)
            query, key, _ = self.project(x)
            key_mask = None if mask is None else mask.flatten(1)
            grid = (x.shape[1], x.shape[2])
            assignment, selected = region_routing(query, key, grid, key_mask=key_mask, **self._routing())
            row, column = selected // grid[1], selected % grid[1]
            real = (selected < grid[0] * grid[1]) & (row < rows) & (column < columns)
            selected = (row * columns + column).clamp(max=rows * columns - 1)
            first = selected.gather(-1, real.int().argmax(-1, keepdim=True))
            cropped = assignment.unflatten(2, grid)[:, :, :rows, :columns].flatten(2)
            return cropped, torch.where(real, selected, first)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, regions={self.regions}, top_k={self.top_k}"

    def _routing(self) -> dict[str, Any]:
        partition = "ceil" if self.uneven == "padded_projection" else "balanced"
        return {"regions": self.regions, "top_k": self.top_k, "partition": partition}

    def _padded(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """In the authors' first way, zeros up to a multiple of `regions`, which count as tokens."""
        down, across = -x.shape[1] % self.regions, -x.shape[2] % self.regions
        if self.uneven != "padded_input" or not (down or across):
            return x, mask
        mask = None if mask is None else F.pad(mask, (0, across, 0, down), value=True)
        return F.pad(x, (0, 0, 0, across, 0, down)), mask

    def _local(
        self, source: Float[Tensor, "batch rows columns dim"], mask: Bool[Tensor, "batch rows columns"] | None
    ) -> Float[Tensor, "batch rows columns dim"]:
        """The convolution, over the borders of regions; tokens that are not real count as zero."""
        assert self.lepe is not None
        if mask is not None:
            source = source.masked_fill(~mask.unsqueeze(-1), 0.0)
        return self.lepe(source.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
