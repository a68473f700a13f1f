"""Cascaded group attention: each head sees its own part of the channels, plus what the head before made of its own.

EfficientViT of Microsoft (not the model of that name from MIT), arXiv 2305.07027 (CVPR 2023), section 3.2. Queries,
keys and values cost 1/heads of the usual, and the heads form a cascade; the query goes through a depth-wise
convolution; logits have a learned bias by the absolute offset of two tokens; all inside windows.

    x (batch, rows, columns, dim) -> windows; f_1 = x_1, f_i = x_i + y_(i-1)
      -> q, k, v = BN(W_i f_i), q = BN(depth-wise convolution of q)   (key_dim, key_dim, dim / heads channels)
      -> y_i = softmax(q k^T / sqrt(key_dim) + bias_i) v              -> BN(W ReLU(y_1, ..., y_h))

Projections are convolutions with batch normalisation, so `qkv` and `proj` are not those of the other mechanisms:
parameters have the names that timm gives them in `efficientvit_m*` (`qkvs`, `dws`, `proj.1`, `attention_biases`). In
inference the normalisations are folded into the projections, anew in each call.

Differences from the authors' code: padding where windows do not divide the grid takes no part in attention (there,
zeros do; `uneven`); a grid smaller than a window is a window of its own, and since the biases go by offset, it uses
those of the offsets it has: nothing is interpolated or refused; the last normalisation starts at one, not at zero, as
blocks here have no rule of their own for it.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from coterie.attention._windows import Windows
from coterie.attention.base import (
    MAX_LOGIT_SCALE,
    GridAttention,
    check_choice,
    check_int,
    register_attention,
    unit_rows,
)
from coterie.ops._state import autocasting
from coterie.ops.cascaded_group import cascaded_group_attention
from coterie.ops.cascaded_group.reference import bias_of_pairs

UNEVEN = ("masked", "padded_input")


@register_attention("cascaded_group")
class CascadedGroupAttention(GridAttention):
    """Heads in a cascade, each on its own channels, inside windows of a 2-dimensional grid.

    Args:
        dim, num_heads, and the keywords of GridAttention; qkv_bias must be True, as batch normalisation has a bias.
        key_dim: channels of query and key of a head; its value has dim / num_heads.
        kernels: sizes (odd) of the convolution of the query: one for all heads, or one per head, of which the first
            num_heads count.
        window_size: rows and columns of a window. A window larger than the grid is the grid.
        uneven: what to do where windows do not divide the grid. "masked": windows at the border are smaller.
            "padded_input" is the authors' way: zeros behind the last row and column of the input take part in
            attention; released models are trained with it.
        backend: of `coterie.ops.cascaded_group_attention`, which inference goes through.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({2})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})
    operation: ClassVar[str] = "cascaded_group_attention"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int = 16,
        kernels: int | Sequence[int] = 5,
        window_size: int = 7,
        uneven: str = "masked",
        backend: str = "auto",
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device="meta", dtype=dtype, **options)
        del self.qkv, self.proj
        check_int("key_dim", key_dim)
        check_int("window_size", window_size)
        check_choice("uneven", uneven, UNEVEN)
        if not qkv_bias:
            raise ValueError("qkv_bias must be True: the batch normalisation of queries, keys and values has a bias")
        sizes = _sizes(kernels, num_heads)
        self.key_dim, self.window_size, self.uneven, self.backend = key_dim, window_size, uneven, backend
        self.scale = key_dim**-0.5
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = 2 * key_dim + self.head_dim
        self.qkvs = nn.ModuleList(_conv_norm(self.head_dim, channels, **dd) for _ in range(num_heads))
        self.dws = nn.ModuleList(_conv_norm(key_dim, key_dim, size, groups=key_dim, **dd) for size in sizes)
        self.proj = nn.Sequential(nn.ReLU(), _conv_norm(dim, dim, **dd))  # type: ignore[assignment]
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, window_size**2, **dd))
        if self.similarity == "cosine":
            self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0), **dd))

    def mix(
        self,
        x: Float[Tensor, "batch rows columns dim"],
        context: Tensor | None,
        *,
        mask: Bool[Tensor, "batch rows columns"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch rows columns dim"]:
        side = self.window_size
        high, wide = x.shape[1:3]
        outside = self.uneven == "padded_input"
        window = (side, side) if outside else (min(side, high), min(side, wide))
        if self._stands_still(x):
            weight, bias = _folded(self.qkvs)
            taps, tap_bias = _folded(self.dws)
            y = cascaded_group_attention(
                x,
                weight.flatten(2),
                bias,
                taps.squeeze(2),
                tap_bias,
                self.attention_biases,
                window=window,
                mask=mask,
                outside=outside,
                scale=self.scale,
                backend=self.backend,
            )
            y = self._projected_like(x, y, mask)
        else:
            y = self._by_head(x, mask, window, outside)
        return self.proj_drop(y)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"attention_biases"}

    def resize_window(self, window_size: int) -> None:
        """Another size of window: the biases are interpolated, as timm does."""
        check_int("window_size", window_size)
        if window_size == self.window_size:
            return
        from timm.layers import resize_rel_pos_bias_table_levit

        with torch.no_grad():
            table = resize_rel_pos_bias_table_levit(self.attention_biases.T, (window_size**2, self.num_heads))
        self.attention_biases = nn.Parameter(table.T.contiguous(), requires_grad=self.attention_biases.requires_grad)
        self.window_size = window_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, key_dim={self.key_dim}, window_size={self.window_size}, uneven={self.uneven}"

    def _stands_still(self, x: Tensor) -> bool:
        """Whether projections and their normalisations are fixed linear maps that the operation can take."""
        if self.similarity == "cosine" or autocasting(x.device.type):
            return False
        return all(_is_fixed(part) for part in (*self.qkvs, *self.dws))

    def _by_head(
        self,
        x: Float[Tensor, "batch rows columns dim"],
        mask: Bool[Tensor, "batch rows columns"] | None,
        window: tuple[int, int],
        outside: bool,
    ) -> Float[Tensor, "batch rows columns dim"]:
        """Head by head, and the output projection: where normalisations learn, and for cosine logits."""
        rows, columns = x.shape[1:3]
        spare = (0, -columns % window[1], 0, -rows % window[0])
        if any(spare) and (mask is not None or not outside):
            mask = torch.ones(x.shape[:3], dtype=torch.bool, device=x.device) if mask is None else mask
            mask = F.pad(mask, spare, value=outside)
        if any(spare):
            x = F.pad(x, (0, 0, *spare))
        windows = Windows((x.shape[1], x.shape[2]), window, (0, 0))
        if windows.grid == window:  # a map as it is, in whatever memory layout
            return self._heads(x.permute(0, 3, 1, 2), mask).permute(0, 2, 3, 1)[:, :rows, :columns]
        real = None
        if mask is not None:
            real = windows.split(mask.unsqueeze(-1), 1).flatten(0, 1).squeeze(-1).unflatten(1, window)
        y = self._heads(windows.split(x, 1).flatten(0, 1).unflatten(1, window).permute(0, 3, 1, 2), real)
        y = windows.join(y.flatten(2).transpose(1, 2).unflatten(0, (len(x), -1)), 1)
        return y[:, :rows, :columns].contiguous()  # a sum with a cut-out is slow, and its gradient too

    def _heads(
        self,
        x: Float[Tensor, "windows dim rows columns"],
        real: Bool[Tensor, "windows rows columns"] | None,
    ) -> Float[Tensor, "windows dim rows columns"]:
        """Attention and output projection inside windows; statistics include zeros that take part."""
        biases = bias_of_pairs(self.attention_biases, (x.shape[2], x.shape[3]))
        outputs: list[Tensor] = []
        for head, part in enumerate(x.chunk(self.num_heads, 1)):
            f = part if not outputs else part + outputs[-1]
            outputs.append(self._head(head, f, biases[head], real))
        return self._projected(torch.cat(outputs, 1), real)

    def _head(
        self,
        head: int,
        f: Float[Tensor, "windows head_dim rows columns"],
        bias: Float[Tensor, "tokens tokens"],
        real: Bool[Tensor, "windows rows columns"] | None,
    ) -> Float[Tensor, "windows head_dim rows columns"]:
        window = f.shape[2:]
        qkv = _apply(self.qkvs[head], f, real)
        query, key, value = qkv.split([self.key_dim, self.key_dim, self.head_dim], 1)
        if real is not None:
            query = query.masked_fill(~real.unsqueeze(1), 0.0)
        query = _apply(self.dws[head], query, real).flatten(2)
        key, value = key.flatten(2), value.flatten(2)
        scale = self.scale
        if self.similarity == "cosine":
            temperature = self.logit_scale[head].clamp(max=MAX_LOGIT_SCALE).exp()
            query = unit_rows(query.transpose(1, 2)).transpose(1, 2) * temperature
            query, key, scale = query.to(value.dtype), unit_rows(key.transpose(1, 2)).transpose(1, 2), 1.0
        logits = torch.baddbmm(bias.to(value.dtype), query.transpose(1, 2), key, alpha=scale)
        if real is None:
            weights = logits.softmax(-1)
        else:
            keys = real.flatten(1).unsqueeze(1)
            nobody = ~keys.any(-1, keepdim=True)
            weights = logits.masked_fill(~keys & ~nobody, float("-inf")).softmax(-1).masked_fill(nobody, 0.0)
        return (value @ weights.to(value.dtype).transpose(1, 2)).unflatten(2, window)

    def _projected(
        self, y: Float[Tensor, "batch dim rows columns"], mask: Bool[Tensor, "batch rows columns"] | None
    ) -> Float[Tensor, "batch dim rows columns"]:
        y, last = F.relu(y), self.proj[1]  # type: ignore[index]
        if not _is_fixed(last):
            return _apply(last, y, mask)
        weight, bias = _folded([last])
        return F.conv2d(y, weight[0], bias[0])

    def _projected_like(
        self,
        x: Float[Tensor, "batch rows columns dim"],
        y: Float[Tensor, "batch rows columns dim"],
        mask: Bool[Tensor, "batch rows columns"] | None,
    ) -> Float[Tensor, "batch rows columns dim"]:
        """The projection of `y`, in the memory layout of `x` where that is a map: sums of the two are faster then."""
        if x.is_contiguous() or not x.permute(0, 3, 1, 2).is_contiguous() or not _is_fixed(self.proj[1]):  # type: ignore[index]
            return self._projected(y.permute(0, 3, 1, 2), mask).permute(0, 2, 3, 1)
        weight, bias = _folded([self.proj[1]])  # type: ignore[index]
        tokens = F.relu(y).flatten(1, 2).transpose(1, 2)
        matrix = weight[0].flatten(1).expand(len(x), -1, -1)
        return torch.baddbmm(bias[0].unsqueeze(1), matrix, tokens).unflatten(2, x.shape[1:3]).permute(0, 2, 3, 1)

    @property
    def qkv(self) -> nn.Module:  # type: ignore[override]
        """The first head's projection: that of the others needs what this one gives."""
        return self.qkvs[0]

    def _check_tokens(self, argument: str, x: Tensor) -> None:
        super()._check_tokens(argument, x)
        weight, name = self.attention_biases, type(self).__name__
        if x.device != weight.device:
            raise ValueError(f"{argument} must be on the device of {name}, {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{argument} must have the dtype of {name}, {weight.dtype}, got {x.dtype}")


def _conv_norm(dim: int, out: int, size: int = 1, *, groups: int = 1, **dd: Any) -> nn.Sequential:
    conv = nn.Conv2d(dim, out, size, padding=size // 2, groups=groups, bias=False, **dd)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out, **dd)))


def _sizes(kernels: int | Sequence[int], num_heads: int) -> list[int]:
    sizes = [kernels] * num_heads if isinstance(kernels, int) else list(kernels)
    for size in sizes:
        check_int("kernels", size)
        if size % 2 == 0:
            raise ValueError(f"kernels must be odd, got {kernels}")
    if len(sizes) < num_heads:
        raise ValueError(f"kernels must be one size or at least {num_heads}, one per head, got {kernels}")
    return sizes[:num_heads]


def _split(part: nn.Module) -> tuple[nn.Conv2d, _BatchNorm | None]:
    """A convolution and its normalisation; None where it has been fused into the convolution, as timm can."""
    if isinstance(part, nn.Conv2d):
        return part, None
    conv, norm = cast(nn.Sequential, part)
    return cast(nn.Conv2d, conv), cast(_BatchNorm, norm)


def _is_fixed(part: nn.Module) -> bool:
    norm = _split(part)[1]
    return norm is None or (not norm.training and norm.running_mean is not None)


def _apply(
    part: nn.Module, x: Float[Tensor, "windows dim rows columns"], real: Bool[Tensor, "windows rows columns"] | None
) -> Float[Tensor, "windows out rows columns"]:
    """The convolution, and the normalisation with the statistics of the real tokens."""
    conv, norm = _split(part)
    y = conv(x)
    if norm is None:
        return y
    if real is None or _is_fixed(part):
        return norm(y)
    tokens = y.permute(0, 2, 3, 1)
    normed = norm(tokens[real][:, :, None, None])[:, :, 0, 0]  # as so many images of one pixel
    zeros = tokens.new_zeros(tokens.shape, dtype=normed.dtype)
    return zeros.masked_scatter(real.unsqueeze(-1), normed).permute(0, 3, 1, 2)


def _folded(
    parts: Iterable[nn.Module],
) -> tuple[Float[Tensor, "parts out in rows columns"], Float[Tensor, "parts out"]]:
    """Weights and biases of convolutions with their normalisations, stacked; smaller kernels inside zeros."""
    convs, norms = zip(*map(_split, parts))
    largest = max(conv.kernel_size[0] for conv in convs)
    margins = [(largest - conv.kernel_size[0]) // 2 for conv in convs]
    weight = torch.stack([F.pad(conv.weight, (m,) * 4) if m else conv.weight for conv, m in zip(convs, margins)])
    if norms[0] is None:
        return weight, torch.stack([conv.bias for conv in convs])
    variance, mean, gain, shift = (
        torch.stack([getattr(norm, name) for norm in norms])
        for name in ("running_var", "running_mean", "weight", "bias")
    )
    wide = torch.promote_types(variance.dtype, torch.float32)
    gain = torch.rsqrt(variance.to(wide) + norms[0].eps) * gain
    shift = torch.addcmul(shift.to(wide), mean.to(wide), gain, value=-1)
    return (weight * gain[:, :, None, None, None]).to(weight.dtype), shift.to(weight.dtype)
