"""LITv2: a pyramid without attention where maps are large, and with HiLo attention where they are small.

"Fast Vision Transformers with HiLo Attention", arXiv 2205.13213, NeurIPS 2022 (authors' code: ziplab/LITv2).

    image (B, 3, H, W)
      stem      4x4 convolution with stride 4, LN                                   (B, C, H/4, W/4)
      stage 1   blocks without attention                                            (B, C, H/4, W/4)
      stage 2   deformable token merging, blocks without attention                  (B, 2C, H/8, W/8)
      stage 3   deformable token merging, blocks with HiLo attention                (B, 4C, H/16, W/16)
      stage 4   deformable token merging, blocks with ordinary attention            (B, 8C, H/32, W/32)
      head      LN, mean over positions, linear

    block       x = x + HiLo(LN(x)) where there is attention;  x = x + ConvFFN(LN(x))
    ConvFFN     linear -> 3x3 depthwise convolution -> GELU -> linear

Nothing but the zeros around the depthwise convolutions tells a token where it is, so any image size works. Sides that
4, 2 or the windows do not divide are filled up with zeros in front of the stem and of each merging, where a convolution
reads zeros beyond its border anyway; in attention no padding exists. The authors' dense models differ there in two
points, which `uneven="authors"` follows: mergings drop the last row or column of an odd map, and HiLo attends to zeros
that fill up its windows. Where every side is a multiple of 32 (64 with HiLo windows of 4), both are the same.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import ClassifierHead, DropPath, register_notrace_module, trunc_normal_
from timm.models import named_apply
from torch import Tensor, nn

from coterie.attention import HiLoAttention
from coterie.attention.base import check_choice
from coterie.layers.batch_norm import as_affine, stands_still
from coterie.layers.layout import to_grid, to_map
from coterie.layers.padding import batch_norm, strided, zero_padding
from coterie.models._checks import check_count, check_pyramid
from coterie.models._pyramid import AsGrid, Pyramid, PyramidStage, drop_path_rates
from coterie.ops._state import exporting
from coterie.ops.deformable import deformable_patches
from coterie.ops.depthwise_gelu import depthwise_gelu

__all__ = ["ConvFeedForward", "DeformableTokenMerging", "LITv2", "LITv2Block", "LITv2Stage", "PatchEmbedding"]

UNEVEN = ("padded", "authors")
PATCH = 4
MERGE = 2
PIECE = 8 * 2**20  # bytes of hidden tokens of a feed-forward that are in work at once, in inference on a CPU
register_notrace_module(HiLoAttention)  # torch.fx takes attention as one node: it looks at shapes and masks


@register_notrace_module  # looks at the size of its input, which torch.fx cannot follow
class PatchEmbedding(nn.Module):
    """A convolution whose patches do not overlap, and a LayerNorm.

    Shape: image (batch, in_chans, H, W) -> (batch, dim, ceil(H / 4), ceil(W / 4)), channels-last.
    """

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, PATCH, PATCH, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Embed the patches; what a mask (True = a real pixel) leaves out counts as zero, as beyond the image."""
        x = zero_padding(x.contiguous(memory_format=torch.channels_last), mask)
        return to_map(self.norm(to_grid(self.proj(_filled_up(x, PATCH)))))


@register_notrace_module  # looks at sizes and modes, which torch.fx cannot follow
class DeformableTokenMerging(nn.Module):
    """2x2 deformable convolution (v1) with stride 2, BatchNorm, GELU (LIT, arXiv 2105.14217, section 3.3).

    Each tap of the convolution looks at its own place plus an offset which another convolution of the same 2x2 patch
    gives. That one starts from zero: then this is an ordinary convolution. In evaluation the BatchNorm
    is folded into the convolution, anew in each call; forward hooks on it are not called then.

    With a mask the result inside does not depend on padding at all: padding is zero in front of both convolutions, and
    zeros are what an offset beyond the border of an image finds, how far beyond it may reach.

    Args:
        in_dim, out_dim: channels of the map and of the merged tokens.
        uneven: for a side of odd length: "padded" with zeros to an even one, or "authors": its last row or column
            begins no patch (offsets may still reach it).

    Shape: (batch, in_dim, H, W) -> token grid (batch, ceil(H / 2), ceil(W / 2), out_dim); floor for "authors".
    """

    def __init__(self, in_dim: int, out_dim: int, *, uneven: str = "padded", device=None, dtype=None) -> None:
        super().__init__()
        check_choice("uneven", uneven, UNEVEN)
        dd = {"device": device, "dtype": dtype}
        self.uneven = uneven
        self.conv = nn.Conv2d(in_dim, out_dim, MERGE, MERGE, **dd)
        self.offset = nn.Conv2d(in_dim, 2 * MERGE**2, MERGE, MERGE, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]  # it has one

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns out_dim"]:
        """Merge 2 x 2 tokens into one; `mask` (True = a real token) belongs to the input."""
        if self.uneven == "authors" and mask is not None:
            raise ValueError("uneven='authors' lets padding take part, so it takes no mask: use uneven='padded'")
        if self.uneven == "authors" and min(x.shape[2:]) < MERGE:
            raise ValueError(f"uneven='authors' merges maps of at least 2 x 2 tokens, got {tuple(x.shape[2:])}")
        x = zero_padding(x, mask)
        offset = to_grid(self.offset(x if self.uneven == "authors" else _filled_up(x, MERGE)))
        taps = deformable_patches(to_grid(x), offset, MERGE)
        weight = self.conv.weight.permute(0, 2, 3, 1).flatten(1)
        bias = self.conv.bias
        assert bias is not None
        if stands_still(self.norm):
            scale, shift = as_affine(self.norm)
            weight, bias = (weight * scale.unsqueeze(1)).to(weight.dtype), (bias * scale + shift).to(weight.dtype)
            return F.gelu(F.linear(taps, weight, bias))
        y = to_map(F.linear(taps, weight, bias))
        return F.gelu(to_grid(batch_norm(self.norm, y, strided(mask, MERGE))))


@register_notrace_module  # checks its arguments, which torch.fx cannot follow
class ConvFeedForward(nn.Module):
    """Linear -> 3x3 depthwise convolution -> GELU -> linear.

    Shape: (batch, height, width, dim) -> the same.
    """

    def __init__(self, dim: int, hidden_dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Apply the network. With a mask (True = a real token) padding is taken for zeros, as it is beyond the grid."""
        if x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and not exporting():
            return self._in_pieces(x, mask)
        return self._whole(x, mask)

    def _whole(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None
    ) -> Float[Tensor, "batch height width dim"]:
        x = self.fc1(x)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        bias = self.dwconv.bias
        assert bias is not None
        return self.fc2(depthwise_gelu(x, self.dwconv.weight, bias))

    def _in_pieces(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None
    ) -> Float[Tensor, "batch height width dim"]:
        """A few images at a time, or a few rows of one, so that the hidden tokens of a piece stay in the cache.

        Pieces of one image read a row more on either side. Gives what `_whole` gives, in half the time where the hidden
        tokens are many: memory that has just been allocated costs more than the arithmetic on it.
        """
        batch, height, width, _ = x.shape
        rows_at_once = max(8, PIECE // (width * self.fc1.out_features * x.element_size()))
        if rows_at_once >= batch * height:
            return self._whole(x, mask)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if rows_at_once >= height:
            step = rows_at_once // height
            for first in range(0, batch, step):
                images = slice(first, first + step)
                y[images] = self._whole(x[images], None if mask is None else mask[images])
            return y
        for image in range(batch):
            for first in range(0, height, rows_at_once):
                top, last = max(0, first - 1), min(height, first + rows_at_once)
                place = (slice(image, image + 1), slice(top, last + 1))
                piece = self._whole(x[place], None if mask is None else mask[place])
                y[image, first:last] = piece[0, first - top : last - top]
        return y


class LITv2Block(nn.Module):
    """HiLo attention if there is any, then the convolutional feed-forward, each with its residual.

    Args:
        dim, num_heads: channels of the tokens, heads of their attention.
        window_size: of HiLo; 1 is ordinary attention, 0 is none.
        alpha: share of the Lo-Fi heads.
        mlp_ratio: hidden over outer channels of the feed-forward.
        uneven: as in `LITv2`.
        drop_path: share of samples for which a branch is left out in training.

    Shape: token grid (batch, height, width, dim) -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        alpha: float,
        mlp_ratio: float,
        uneven: str,
        drop_path: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn: HiLoAttention | None = None
        if window_size:
            filled = "zeros" if uneven == "authors" else "smaller"
            self.norm1 = nn.LayerNorm(dim, **dd)
            self.attn = HiLoAttention(dim, num_heads, alpha=alpha, window_size=window_size, uneven=filled, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = ConvFeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Apply the block. With a mask (True = a real token) padding changes nothing at the other tokens."""
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x), mask=mask))
        return x + self.drop_path(self.mlp(self.norm2(x), mask))


class LITv2Stage(PyramidStage):
    """Deformable token merging (not in the first stage) and blocks.

    Shape: feature map (batch, in_dim, H, W) -> (batch, dim, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        *,
        merge: bool,
        uneven: str,
        drop_path: Sequence[float],
        device=None,
        dtype=None,
        **block: Any,
    ) -> None:
        super().__init__(MERGE if merge else 1)
        dd = {"device": device, "dtype": dtype}
        self.downsample = DeformableTokenMerging(in_dim, dim, uneven=uneven, **dd) if merge else AsGrid()
        self.blocks = nn.Sequential(
            *(LITv2Block(dim, num_heads, uneven=uneven, drop_path=rate, **block, **dd) for rate in drop_path)
        )


class LITv2(Pyramid):
    """A pyramid of LITv2 blocks, with timm's model interface.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (timm's poolings).
        dims, depths, num_heads: channels, blocks and heads of each stage.
        window_size: windows of HiLo in each stage: 0 for no attention, 1 for ordinary attention.
        alpha: share of the Lo-Fi heads, rounded down to whole heads.
        mlp_ratio: hidden over outer channels of the feed-forward.
        uneven: sizes that do not divide: "padded", or "authors" (their detection and segmentation models): odd maps
            lose their last row or column in merging, and HiLo attends to the zeros that fill up its windows. The
            released classifiers were trained where both are the same. "authors" takes no masks.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks. The paper trains
            small with 0.2, medium with 0.3 and base with 0.5.

    Shape: image (batch, in_chans, height, width) of any size -> logits (batch, num_classes).
    """

    stem_stride = PATCH

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        uneven: str = "padded",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_pyramid(in_chans, num_classes, dims, depths, num_heads, PATCH, drop_rate, drop_path_rate)
        if isinstance(window_size, int) or len(window_size) != len(dims):
            raise ValueError(f"window_size must have one entry per stage, {len(dims)}, got {window_size!r}")
        for size in window_size:
            check_count("each of window_size", size, least=0)
        check_choice("uneven", uneven, UNEVEN)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.uneven = uneven
        self.feature_info: list[dict[str, Any]] = []

        self.stem = PatchEmbedding(in_chans, dims[0], **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for index, (dim, heads, window) in enumerate(zip(dims, num_heads, window_size)):
            stage = LITv2Stage(
                dims[max(0, index - 1)],
                dim,
                heads,
                merge=index > 0,
                uneven=uneven,
                drop_path=rates[index],
                window_size=window,
                alpha=alpha,
                mlp_ratio=mlp_ratio,
                **dd,
            )
            stages.append(stage)
            self.feature_info.append({"num_chs": dim, "reduction": PATCH * MERGE**index, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.norm: nn.Module = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        named_apply(_init_weights, self)

    def from_authors(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors of an authors' classifier under this model's names, and what is dropped, with why (nothing)."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in state.items():
            for pattern, ours in _NAMES:
                name = re.sub(pattern, ours, name)
            tensors[re.sub(r"@(\d+)", lambda number: str(int(number[1]) + 1), name)] = tensor
        return tensors, {}


_NAMES = (
    (r"^patch_embed\.", "stem."),
    (r"^layers\.(\d+)\.downsample\.", r"stages.@\1.downsample."),  # ours belongs to the stage after it
    (r"^layers\.", "stages."),
    (r"\.dconv\.conv_offset\.", ".offset."),
    (r"\.dconv\.", ".conv."),
    (r"\.norm_layer\.", ".norm."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^head\.", "head.fc."),
)


def _filled_up(x: Float[Tensor, "batch dim height width"], size: int) -> Float[Tensor, "batch dim rows columns"]:
    """Zeros behind the last row and column up to multiples of `size`."""
    down, across = -x.shape[2] % size, -x.shape[3] % size
    return F.pad(x, (0, across, 0, down)) if down or across else x


def _init_weights(module: nn.Module, name: str = "") -> None:
    """As the authors: linear layers from a narrow normal, depthwise convolutions by Kaiming."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ConvFeedForward):
        nn.init.normal_(module.dwconv.weight, std=math.sqrt(2 / 9))
        nn.init.zeros_(module.dwconv.bias)  # type: ignore[arg-type]  # it has one
