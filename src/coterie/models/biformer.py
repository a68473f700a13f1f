"""BiFormer: a pyramid whose regions choose the regions that they attend to (bi-level routing attention).

"BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023, arXiv 2303.08810; authors' code
rayleizhu/BiFormer.

    image (B, 3, H, W)
      stem      3x3 convolution with stride 2, BN, GELU, 3x3 convolution with stride 2, BN    (B, C, H/4, W/4)
      stage 1   blocks; 7 x 7 regions, of which each attends to 1                             (B, C, H/4, W/4)
      stage 2   3x3 convolution with stride 2, BN, then blocks; each region to 4              (B, 2C, H/8, W/8)
      stage 3   the same; each region to 16                                                   (B, 4C, H/16, W/16)
      stage 4   the same, with global attention of 8 heads                                    (B, 8C, H/32, W/32)
      head      BN, mean over positions, linear

    block       x = x + DWConv3x3(x);  x = x + Attention(LN(x));  x = x + MLP(LN(x))

The authors' ablation with the layout of Swin-T ("STL") has 4x4 patches for a stem, BN and a 2x2 convolution with stride
2 between stages, and no DWConv3x3. There a last row or column that is left over is filled up with zeros here; the
authors' convolutions drop it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import ClassifierHead, DropPath, Mlp, register_notrace_module, trunc_normal_
from timm.models import named_apply
from torch import Tensor, nn

from coterie.attention import BiLevelRoutingAttention
from coterie.layers import ConditionalPositionEncoding
from coterie.layers.layout import to_grid
from coterie.layers.padding import batch_norm, strided, zero_padding
from coterie.models._checks import check_count, check_pyramid
from coterie.models._pyramid import AsGrid, Pyramid, PyramidStage, drop_path_rates

__all__ = ["BiFormer", "BiFormerBlock", "BiFormerStage"]

LAYOUTS = ("convolutional", "swin")
PAPER_TOP_K = (1, 4, 16, None)
LEPE = 5
LayerNorm = partial(nn.LayerNorm, eps=1e-6)
register_notrace_module(BiLevelRoutingAttention)  # torch.fx takes it as one node: it looks at shapes and masks


@register_notrace_module  # looks at shapes and masks, which torch.fx cannot follow
class ConvStem(nn.Module):
    """Two 3x3 convolutions with stride 2, each with BN, GELU between them.

    Shape: (batch, in_chans, H, W) -> (batch, dim, ceil(H / 4), ceil(W / 4)), channels-last.
    """

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim // 2, **dd)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)

    def forward(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Apply the stem; padding, where `mask` is False, changes nothing inside and is zero afterwards."""
        x = zero_padding(x.contiguous(memory_format=torch.channels_last), mask)
        x = zero_padding(F.gelu(batch_norm(self.norm1, self.conv1(x), strided(mask, 2))), strided(mask, 2))
        return batch_norm(self.norm2, self.conv2(x), strided(mask, 4))


@register_notrace_module
class PatchStem(nn.Module):
    """4x4 convolution with stride 4, BN; images are filled up with zeros to whole patches.

    Shape: (batch, in_chans, H, W) -> (batch, dim, ceil(H / 4), ceil(W / 4)), channels-last.
    """

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 4, 4, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Apply the stem, with `mask` as ConvStem has it."""
        x = zero_padding(x.contiguous(memory_format=torch.channels_last), mask)
        return batch_norm(self.norm, self.conv(_whole_patches(x, 4)), strided(mask, 4))


@register_notrace_module
class ConvMerging(nn.Module):
    """3x3 convolution with stride 2, then BN.

    Shape: (batch, in_dim, H, W) -> token grid (batch, ceil(H / 2), ceil(W / 2), out_dim).
    """

    def __init__(self, in_dim: int, out_dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, out_dim, 3, 2, padding=1, device=device, dtype=dtype)
        self.norm = nn.BatchNorm2d(out_dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns out_dim"]:
        """Merge tokens; padding is taken for zeros, as what is beyond the map."""
        return to_grid(batch_norm(self.norm, self.conv(zero_padding(x, mask)), strided(mask, 2)))


@register_notrace_module
class PatchMerging(nn.Module):
    """BN, then 2x2 convolution with stride 2; maps are filled up with zeros to whole patches.

    Shape: (batch, in_dim, H, W) -> token grid (batch, ceil(H / 2), ceil(W / 2), out_dim).
    """

    def __init__(self, in_dim: int, out_dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_dim, device=device, dtype=dtype)
        self.conv = nn.Conv2d(in_dim, out_dim, 2, 2, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns out_dim"]:
        """Merge tokens; padding is taken for zeros, as what is beyond the map."""
        return to_grid(self.conv(_whole_patches(batch_norm(self.norm, x, mask), 2)))


class BiFormerBlock(nn.Module):
    """Position encoding, attention and feed-forward, each with its residual.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
        attention: options of BiLevelRoutingAttention.
        mlp_ratio: hidden over outer channels of the feed-forward.
        position: add a 3x3 depthwise convolution first.
        drop_path: share of samples for which a branch is left out in training.

    Shape: token grid (batch, height, width, dim) -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention: Mapping[str, Any],
        mlp_ratio: float,
        position: bool,
        drop_path: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.position = ConditionalPositionEncoding(dim, **dd) if position else None
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = BiLevelRoutingAttention(dim, num_heads, **attention, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Apply the block. With a mask (True = a real token) padding changes nothing at the other tokens."""
        if self.position is not None:
            x = self.position(x, mask)
        x = x + self.drop_path(self.attn(self.norm1(x), mask=mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormerStage(PyramidStage):
    """Merging (Identity in the first stage, which begins at the stem's map), then blocks.

    Shape: feature map (batch, in_dim, H, W) -> (batch, dim, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    def __init__(self, downsample: nn.Module, dim: int, num_heads: int, *, stride: int, drop_path, **block) -> None:
        super().__init__(stride)
        self.downsample = downsample
        self.blocks = nn.Sequential(*(BiFormerBlock(dim, num_heads, drop_path=rate, **block) for rate in drop_path))


class BiFormer(Pyramid):
    """A pyramid of bi-level routing attention, with timm's model interface.

    The defaults are how the released weights have been trained; see docs/models/biformer.md for each difference.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (timm's poolings).
        dims, depths, num_heads: channels, blocks and heads of each stage.
        regions: regions along each side of the map, for all stages or one number per stage. A map needs at least as
            many tokens along each side: with 7 in the first three stages an image of 97 pixels; for images of 32 x 32
            use (4, 4, 2, 1).
        top_k: regions that each region attends to, one number per stage, None for global attention (with a projection
            without bias, as the authors have it). The default is the paper's 1, 4, 16 and global, or all regions where
            there are fewer.
        layout: "convolutional", or "swin": stem and merging of patches, no position encoding.
        mlp_ratio: hidden over outer channels of the feed-forward.
        scale: of the logits where regions are chosen: "dim", dim^-0.5, or "head", head_dim^-0.5.
        uneven: what happens where `regions` does not divide a side of the map: "balanced", "padded_input" or
            "padded_projection"; see BiLevelRoutingAttention.
        global_lepe_of: what the depthwise convolution beside global attention reads: "input", or "value", as in the
            weights of the authors' refactored code ("nchw").
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks.

    Shape: image (batch, in_chans, height, width) -> logits (batch, num_classes).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 4, 8, 8),
        regions: int | Sequence[int] = 7,
        top_k: Sequence[int | None] | None = None,
        layout: str = "convolutional",
        mlp_ratio: float = 3.0,
        scale: str = "dim",
        uneven: str = "balanced",
        global_lepe_of: str = "input",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_pyramid(in_chans, num_classes, dims, depths, num_heads, 4, drop_rate, drop_path_rate)
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
        chosen = _routing(regions, top_k, len(dims))
        self.in_chans, self.num_classes, self.layout = in_chans, num_classes, layout
        self.global_lepe_of = global_lepe_of
        self.stem_stride = 4
        stem, merging = (ConvStem, ConvMerging) if layout == "convolutional" else (PatchStem, PatchMerging)
        self.stem = stem(in_chans, dims[0], **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for index, (dim, heads, (side, most)) in enumerate(zip(dims, num_heads, chosen)):
            options = {"regions": side, "top_k": most, "scale": scale, "uneven": uneven, "lepe": LEPE}
            if most is None:  # one region is global attention
                options = {"regions": 1, "top_k": 1, "lepe": LEPE, "lepe_of": global_lepe_of, "qkv_bias": False}
            stage = BiFormerStage(
                merging(dims[index - 1], dim, **dd) if index else AsGrid(),
                dim,
                heads,
                stride=2 if index else 1,
                drop_path=rates[index],
                attention=options,
                mlp_ratio=mlp_ratio,
                position=layout == "convolutional",
                **dd,
            )
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**index, "module": f"stages.{index}"} for index, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm: nn.Module = nn.BatchNorm2d(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        named_apply(_init_weights, self)

    def final_norm(
        self, x: Float[Tensor, "batch dim rows columns"], mask: Bool[Tensor, "batch rows columns"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The batch normalisation after the last stage, whose statistics are those of real tokens."""
        return batch_norm(self.norm, x, mask) if isinstance(self.norm, nn.BatchNorm2d) else self.norm(x)

    def from_authors(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The authors' weights under the names here, for `coterie.models.load_authors_checkpoint`.

        Raises:
            ValueError: weights of the refactored code ("nchw") for a model that is not built for them, or the reverse.
        """
        refactored = any(".qkv_linear." in name for name in state)
        needs = "value" if refactored else "input"
        if self.global_lepe_of != needs:
            kind = "refactored ('nchw')" if refactored else "first"
            raise ValueError(
                f"these are weights of the authors' {kind} code, whose last stage convolves the {needs}: "
                f"create the model with global_lepe_of={needs!r}, got {self.global_lepe_of!r}"
            )
        return {self._own_name(name): _linear(name, value) for name, value in state.items()}, {}

    def _own_name(self, name: str) -> str:
        part, *rest = name.split(".")
        if part == "head":
            return ".".join(["head.fc", *rest])
        if part == "downsample_layers" and len(rest) == 3:
            index, place, kind = rest
            names = _DOWNSAMPLE[self.layout][0 if index == "0" else 1]
            where = "stem" if index == "0" else f"stages.{index}.downsample"
            return f"{where}.{names.get(place, place)}.{kind}"
        if part == "stages" and len(rest) > 2:
            stage, *block = rest
            if block[0] == "blocks":
                block = block[1:]
            inside = ".".join(block)
            for theirs, ours in _BLOCK:
                inside = inside.replace(theirs, ours)
            return f"stages.{stage}.blocks.{inside}"
        return name


# What the authors call the layers of stem and merging, by layout; and what they call those of a block.
_DOWNSAMPLE = {
    "convolutional": ({"0": "conv1", "1": "norm1", "3": "conv2", "4": "norm2"}, {"0": "conv", "1": "norm"}),
    "swin": ({"0": "conv", "1": "norm"}, {"0": "norm", "1": "conv"}),
}
_BLOCK = (
    (".pos_embed.", ".position.conv."),
    (".attn.qkv.qkv.", ".attn.qkv."),
    (".attn.qkv_linear.", ".attn.qkv."),
    (".attn.wo.", ".attn.proj."),
    (".attn.output_linear.", ".attn.proj."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.2.", ".mlp.fc2."),
    (".mlp.3.", ".mlp.fc2."),
)


def _linear(name: str, value: Tensor) -> Tensor:
    """The refactored code has 1x1 convolutions where linear layers are here."""
    inside = name.startswith("stages.") and not name.endswith((".pos_embed.weight", ".lepe.weight"))
    return value.flatten(1) if inside and value.ndim == 4 and value.shape[2:] == (1, 1) else value


def _routing(
    regions: int | Sequence[int], top_k: Sequence[int | None] | None, stages: int
) -> list[tuple[int, int | None]]:
    """`regions` and `top_k` of each stage."""
    sides = list(regions) if isinstance(regions, Sequence) else [regions] * stages
    for side in sides:
        check_count("each of regions", side, least=1)
    if top_k is None:
        paper = [*PAPER_TOP_K, *(None for _ in range(stages))]
        most = [None if k is None else min(k, side * side) for k, side in zip(paper, sides)]
    elif isinstance(top_k, Sequence):
        most = list(top_k)
    else:
        raise TypeError(f"top_k must be one number (or None) per stage, got {top_k!r}")
    for name, values in (("regions", sides), ("top_k", most)):
        if len(values) != stages:
            raise ValueError(f"{name} must have one number for each of {stages} stages, got {len(values)}: {values}")
    return list(zip(sides, most))


def _whole_patches(x: Float[Tensor, "batch dim height width"], side: int) -> Float[Tensor, "batch dim rows columns"]:
    """Zeros below and to the right, up to a multiple of `side`."""
    down, across = -x.shape[2] % side, -x.shape[3] % side
    if not (down or across):
        return x
    return F.pad(x, (0, across, 0, down)).contiguous(memory_format=torch.channels_last)


def _init_weights(module: nn.Module, name: str = "") -> None:
    """As the authors: linear layers from a narrow normal; convolutions and norms as torch has them."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
