"""HiLo attention: some heads look closely inside small windows, the others look at everything through an average.

LITv2, "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213 (NeurIPS 2022), section 3. Of the heads, a share
`alpha` (rounded down) is Lo-Fi: their queries attend to the whole grid averaged over `window_size` x `window_size`
tokens. The rest is Hi-Fi: exact attention inside windows of that size. Their outputs are joined, Hi-Fi first. With
windows of one token all heads are Lo-Fi over the whole grid: ordinary attention.

    x (batch, *grid, dim) -> Hi-Fi  h_qkv, windows, h_proj                  (batch, *grid, hi dim)
                          -> Lo-Fi  l_q of x, l_kv of the averages, l_proj  (batch, *grid, lo dim)

Parameters are those of the authors' code (ziplab/LITv2), not the `qkv` and `proj` that the other mechanisms share:
keys and values of Lo-Fi are projected after averaging, which is cheaper, and the two groups have output projections of
their own, which makes fewer parameters (dim^2 (3 + share^2 + (1 - share)^2) weights, share = Lo-Fi's part).

Difference from the authors' code, as an option: a grid that windows do not divide is there filled up with zeros that
count as tokens (`uneven="zeros"`, what their detection and segmentation models do); here windows at the border are
smaller ones, averages are those of real tokens, and no padding exists.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.attention._windows import Windows
from coterie.attention.base import (
    MAX_LOGIT_SCALE,
    GridAttention,
    check_choice,
    check_int,
    exact_attention,
    register_attention,
    unit_rows,
)

UNEVEN = ("smaller", "zeros")
_AVERAGES = {2: F.avg_pool2d, 3: F.avg_pool3d}


@register_attention("hilo")
class HiLoAttention(GridAttention):
    """Attention inside windows for some heads, to averages of windows for the others.

    A backbone has fewer parameters with it than with mechanisms that share `qkv` and `proj`; see above.

    Args:
        dim, num_heads, and the keywords of GridAttention.
        alpha: share of the Lo-Fi heads, int(num_heads * alpha) of them (the paper's models: 0.9).
        window_size: side of the windows, and of what is averaged (the paper: 2; 1 in the last stage).
        uneven: what to do where windows do not divide a side: "smaller" windows at the border, or "zeros" behind the
            last row and column of the input, which take part in attention and averages (the authors' dense models).
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        alpha: float = 0.9,
        window_size: int = 2,
        uneven: str = "smaller",
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, device=device, dtype=dtype, **options)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise TypeError(f"alpha must be a number, got {alpha!r} of type {type(alpha).__name__}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 (all heads Hi-Fi) to 1 (all Lo-Fi), got {alpha}")
        check_int("window_size", window_size)
        check_choice("uneven", uneven, UNEVEN)
        self.alpha, self.window_size, self.uneven = alpha, window_size, uneven
        self.lo_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.hi_heads = num_heads - self.lo_heads
        lo, hi = self.lo_heads * self.head_dim, self.hi_heads * self.head_dim
        del self.qkv, self.proj
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if lo:
            self.l_q = nn.Linear(dim, lo, bias=qkv_bias, **dd)
            self.l_kv = nn.Linear(dim, 2 * lo, bias=qkv_bias, **dd)
            self.l_proj = nn.Linear(lo, lo, **dd)
        if hi:
            self.h_qkv = nn.Linear(dim, 3 * hi, bias=qkv_bias, **dd)
            self.h_proj = nn.Linear(hi, hi, **dd)

    @property
    def qkv(self) -> nn.Linear:  # type: ignore[override]
        """The first projection that meets the input, whose device and dtype the input must have."""
        return self.l_q if self.lo_heads else self.h_qkv

    def mix(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Tensor | None,
        *,
        mask: Bool[Tensor, " batch *grid"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch *grid dim"]:
        grid = tuple(x.shape[1:-1])
        x, mask = self._padded(x, mask)
        parts = []
        if self.hi_heads:
            parts.append(self._inside_windows(x, mask))
        if self.lo_heads:
            parts.append(self._to_averages(x, mask))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        for axis, size in enumerate(grid, 1):
            y = y.narrow(axis, 0, size)
        return self.proj_drop(y)

    def extra_repr(self) -> str:
        split = f"hi_heads={self.hi_heads}, lo_heads={self.lo_heads}"
        return f"{super().extra_repr()}, window_size={self.window_size}, {split}, uneven={self.uneven}"

    def _padded(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """In the authors' way, zeros up to a multiple of the window, which count as tokens."""
        spare = [-size % self.window_size for size in x.shape[1:-1]]
        if self.uneven != "zeros" or not any(spare):
            return x, mask
        behind = [n for amount in reversed(spare) for n in (0, amount)]
        return F.pad(x, [0, 0, *behind]), None if mask is None else F.pad(mask, behind, value=True)

    def _inside_windows(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "batch *grid hi_dim"]:
        batch, *grid, _ = x.shape
        windows = Windows.fit(tuple(grid), (self.window_size,) * len(grid), (0,) * len(grid))
        cut = windows.split(self.h_qkv(x), 1)  # (batch, windows, window tokens, 3 hi_dim)
        qkv = cut.flatten(0, 1).unflatten(-1, (3, self.hi_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        allowed = windows.allowed(mask, x.device)
        if allowed is not None:
            allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        y = self._attention(qkv[0], qkv[1], qkv[2], allowed, slice(0, self.hi_heads))
        return self.h_proj(windows.join(y.transpose(1, 2).reshape(*cut.shape[:3], -1), 1))

    def _to_averages(self, x: Tensor, mask: Tensor | None) -> Float[Tensor, "batch *grid lo_dim"]:
        averages, key_mask = self._averages(x, mask)
        query = self.l_q(x).flatten(1, -2).unflatten(-1, (self.lo_heads, self.head_dim)).transpose(1, 2)
        kv = self.l_kv(averages.flatten(1, -2)).unflatten(-1, (2, self.lo_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        allowed = None if key_mask is None else key_mask.flatten(1)[:, None, None]
        y = self._attention(query, kv[0], kv[1], allowed, slice(self.hi_heads, self.num_heads))
        return self.l_proj(y.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def _averages(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The mean of the real tokens of each window, and which windows have any."""
        if self.window_size == 1:
            return x, mask
        average = _AVERAGES[x.ndim - 2]
        window = tuple(min(self.window_size, side) for side in x.shape[1:-1])
        options: dict[str, Any] = {"kernel_size": window, "ceil_mode": True, "count_include_pad": False}
        wide = torch.promote_types(x.dtype, torch.float32)
        tokens = x if x.ndim == 4 and mask is None else x.to(wide)  # torch averages half precision in 2 dimensions only
        if mask is None:
            return average(tokens.movedim(-1, 1), **options).movedim(1, -1).to(x.dtype), None
        share = average(mask.unsqueeze(1).to(wide), **options)
        some = share > 0
        total = average(tokens.masked_fill(~mask.unsqueeze(-1), 0.0).movedim(-1, 1), **options)
        return (total / share.masked_fill(~some, 1.0)).movedim(1, -1).to(x.dtype), some[:, 0]

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None, heads: slice) -> Tensor:
        """Exact attention of some of the heads, (..., heads, tokens, head_dim)."""
        if self.similarity == "dot":
            return exact_attention(query, key, value, allowed=allowed, scale=self.scale)
        temperature = self.logit_scale[heads].clamp(max=MAX_LOGIT_SCALE).exp()
        query, key = (unit_rows(query) * temperature).to(value.dtype), unit_rows(key).to(value.dtype)
        return exact_attention(query, key, value, allowed=allowed, scale=1.0)
