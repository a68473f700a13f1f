"""CrossFormer and CrossFormer++: a pyramid whose tokens hold several scales, and attend near and far in turn.

"CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", ICLR 2022, arXiv 2108.00154;
"CrossFormer++", TPAMI 2023, arXiv 2303.06908. Authors' code: cheerss/CrossFormer.

    image (B, 3, H, W)
      stem      convolutions of kernels 4, 8, 16, 32 with stride 4, concatenated, LN     (B, C, H/4, W/4)
      stage 1   blocks                                                                   (B, C, H/4, W/4)
      stage 2   LN, convolutions of kernels 2, 4 with stride 2, concatenated; blocks     (B, 2C, H/8, W/8)
      stage 3   the same                                                                 (B, 4C, H/16, W/16)
      stage 4   the same                                                                 (B, 8C, H/32, W/32)
      head      LN, mean over tokens, linear

    block       x = x + Attention(LN(x));  x = x + MLP(LN(x))        short distance in even blocks, long in odd ones
                x = LN(DWConv(x))                                    ++: after blocks 3, 6, ... but the last of a stage

CrossFormer++ is the same network with groups that grow from stage to stage (4, 4, 14, 7) and with these cooling layers.
The sizes are in `crossformer_sizes.py`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import ClassifierHead, DropPath, register_notrace_module, trunc_normal_
from timm.models import named_apply
from torch import Tensor, nn

from coterie.attention import LongShortDistanceAttention
from coterie.layers.by_rows import by_rows
from coterie.layers.layout import to_grid, to_map
from coterie.layers.padding import zero_padding
from coterie.models._checks import check_pyramid
from coterie.models._pyramid import AsGrid, Pyramid, PyramidStage, drop_path_rates

__all__ = ["CrossFormer", "CrossFormerBlock", "CrossFormerStage", "CrossScaleEmbedding"]

LayerNorm = partial(nn.LayerNorm, eps=1e-5)
STEM_KERNELS, STEM_STRIDE = (4, 8, 16, 32), 4
MERGE_KERNELS, MERGE_STRIDE = (2, 4), 2
COOLING_EVERY = 3


@register_notrace_module  # pads by the size of its input, which torch.fx cannot follow
class CrossScaleEmbedding(nn.Module):
    """Convolutions with one stride and several kernels around the same places, side by side in the channels.

    The first kernel gets half of the channels, the second a quarter, ...; the last as many as the one before. A map
    that the stride does not divide is filled up with zeros at its end.

    Args:
        in_dim, out_dim: channels.
        kernels: sizes, the smallest first; each minus the stride must be even.
        stride: of all of them.

    Shape: (batch, in_dim, H, W) -> (batch, out_dim, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    def __init__(
        self, in_dim: int, out_dim: int, kernels: Sequence[int], stride: int, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        parts = [out_dim >> n for n in range(1, len(kernels))]
        self.stride = stride
        self.projs = nn.ModuleList(
            nn.Conv2d(in_dim, dim, kernel, stride, (kernel - stride) // 2, device=device, dtype=dtype)
            for dim, kernel in zip([*parts, out_dim - sum(parts)], kernels, strict=True)
        )

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch out_dim rows columns"]:
        """Embed. With a mask (True = real) padding is taken for zeros, as it is beyond the map."""
        x = zero_padding(x, mask)
        down, across = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        if down or across:
            x = F.pad(x, (0, across, 0, down))
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.cat([self._embed(proj, x) for proj in self.projs], 1)

    def _embed(self, proj: nn.Module, x: Float[Tensor, "batch in_dim height width"]) -> Tensor:
        """A large kernel over few channels becomes a small one over many, which processors do several times faster.

        Cells of stride x stride pixels are seen as the channels of one; the kernel then covers whole cells.
        """
        if type(proj) is not nn.Conv2d:  # an adapter, or quantised
            return proj(x)
        kernel, step = proj.kernel_size[0], self.stride
        cells, margin = kernel // step, (kernel - step) // 2
        if cells < 4 or kernel % step:
            return proj(x)
        x = F.pixel_unshuffle(F.pad(x.contiguous(), (margin,) * 4), step)
        weight = proj.weight.unflatten(3, (cells, step)).unflatten(2, (cells, step)).permute(0, 1, 3, 5, 2, 4)
        return F.conv2d(x, weight.flatten(1, 3), proj.bias).contiguous(memory_format=torch.channels_last)


class CrossFormerStem(CrossScaleEmbedding):
    """The embedding of the image, and a LayerNorm over its channels."""

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__(in_chans, dim, STEM_KERNELS, STEM_STRIDE, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Images to a map of tokens."""
        return to_map(self.norm(to_grid(super().forward(x, mask))))


class CrossScaleMerging(CrossScaleEmbedding):
    """LayerNorm, then the embedding with half the resolution; no norm follows."""

    def __init__(self, in_dim: int, out_dim: int, *, device=None, dtype=None) -> None:
        super().__init__(in_dim, out_dim, MERGE_KERNELS, MERGE_STRIDE, device=device, dtype=dtype)
        self.norm = LayerNorm(in_dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns out_dim"]:
        """A map to a coarser token grid."""
        return to_grid(super().forward(to_map(self.norm(to_grid(x))), mask))


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """Each token by itself."""
        return self.fc2(F.gelu(self.fc1(x)))


class CoolingLayer(nn.Module):
    """The amplitude cooling layer of CrossFormer++: 3x3 depthwise convolution and LayerNorm, without a residual.

    It brings the amplitude of the tokens, which grows from residual to residual, back to that of a LayerNorm.
    """

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.norm = LayerNorm(dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """With a mask (True = a real token) padding is taken for zeros, as it is beyond the grid."""
        return self.norm(to_grid(self.conv(zero_padding(to_map(x), mask))))


class CrossFormerBlock(nn.Module):
    """Attention and feed-forward, each with its residual, and a cooling layer or none.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden over outer channels of the feed-forward.
        cooling: whether a cooling layer follows.
        drop_path: share of samples for which a branch is left out in training.
        **attention: options of `LongShortDistanceAttention`.

    Shape: token grid (batch, height, width, dim) -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        cooling: bool,
        drop_path: float,
        device=None,
        dtype=None,
        **attention: Any,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = LongShortDistanceAttention(dim, num_heads, dynamic_position_bias=True, **attention, **dd)
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.cooling = CoolingLayer(dim, **dd) if cooling else None

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Apply the block. With a mask (True = a real token) padding changes nothing at the other tokens."""
        x = by_rows(self, self._second_half, x, self.attn(self.norm1(x), mask=mask))
        return x if self.cooling is None else self.cooling(x, mask)

    def _second_half(
        self, x: Float[Tensor, "*tokens dim"], attended: Float[Tensor, "*tokens dim"]
    ) -> Float[Tensor, "*tokens dim"]:
        """What each token does by itself."""
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


register_notrace_module(LongShortDistanceAttention)  # torch.fx takes it as one node: it looks at shapes and masks


class CrossFormerStage(PyramidStage):
    """Merging, but in the first stage, and blocks.

    Shape: feature map (batch, in_dim, H, W) -> (batch, dim, H / 2 or H, W / 2 or W), rounded up, channels-last.
    """

    def __init__(
        self,
        in_dim: int | None,
        dim: int,
        num_heads: int,
        *,
        drop_path: Sequence[float],
        cooling: bool,
        device=None,
        dtype=None,
        **block: Any,
    ) -> None:
        super().__init__(1 if in_dim is None else MERGE_STRIDE)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.downsample = AsGrid() if in_dim is None else CrossScaleMerging(in_dim, dim, **dd)
        last = len(drop_path) - 1
        self.blocks = nn.Sequential(
            *(
                CrossFormerBlock(
                    dim,
                    num_heads,
                    block_index=index,
                    drop_path=rate,
                    cooling=cooling and index < last and (index + 1) % COOLING_EVERY == 0,
                    **block,
                    **dd,
                )
                for index, rate in enumerate(drop_path)
            )
        )


class CrossFormer(Pyramid):
    """A pyramid of CrossFormer blocks, with timm's model interface.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (timm's poolings).
        dims, depths, num_heads: channels, blocks and heads of each stage.
        group_size: tokens along each side of a group, in each stage.
        interval: how far apart the tokens of a long-distance group are, in each stage, or "growing". Only at other
            sizes than 224 x 224 does it matter, and with "growing" a model is what the authors' older code makes of
            its weights. See `LongShortDistanceAttention`, as for `small_grids`.
        cooling: the cooling layers of CrossFormer++.
        mlp_ratio: hidden over outer channels of the feed-forward.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks.

    Shape: image (batch, in_chans, height, width) of any size -> logits (batch, num_classes).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 1, 8, 6),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        group_size: Sequence[int] = (7, 7, 7, 7),
        interval: Sequence[int] | str = (8, 4, 2, 1),
        small_grids: str = "axes",
        cooling: bool = False,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_pyramid(in_chans, num_classes, dims, depths, num_heads, STEM_STRIDE, drop_rate, drop_path_rate)
        intervals = [interval] * len(dims) if isinstance(interval, str) else list(interval)
        for name, values in (("group_size", group_size), ("interval", intervals)):
            if len(values) != len(dims):
                raise ValueError(f"{name} must have one entry per stage, {len(dims)}, got {len(values)}: {values}")
        if dims[0] % 2 ** (len(STEM_KERNELS) - 1):
            raise ValueError(f"dims[0] must be a multiple of 8, as the stem's kernels share it, got {dims[0]}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.stem_stride = STEM_STRIDE
        self.feature_info: list[dict[str, Any]] = []

        self.stem = CrossFormerStem(in_chans, dims[0], **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for index, (dim, heads) in enumerate(zip(dims, num_heads)):
            stage = CrossFormerStage(
                dims[index - 1] if index else None,
                dim,
                heads,
                drop_path=rates[index],
                cooling=cooling,
                mlp_ratio=mlp_ratio,
                group_size=group_size[index],
                interval=intervals[index],
                small_grids=small_grids,
                **dd,
            )
            stages.append(stage)
            reduction = STEM_STRIDE * MERGE_STRIDE**index
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.norm: nn.Module = LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        named_apply(_init_weights, self)

    def from_authors(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """A checkpoint of cheerss/CrossFormer, of the newer or the older code, under this model's names.

        Returns:
            The tensors, and the authors' keys that are dropped, with why.
        """
        tensors: dict[str, Tensor] = {}
        dropped: dict[str, str] = {}
        for key, tensor in state.items():
            why = next((why for name, why in _AUTHORS_BUFFERS.items() if key.endswith(name)), None)
            if why is None:
                tensors[_from_authors(key)] = tensor
            else:
                dropped[key] = why
        return tensors, dropped


_AUTHORS_BUFFERS = {
    ".attn.pos.biases": "a constant, the offsets of a group, which is made when it is needed",
    ".attn.biases": "a constant, the offsets of a group, which is made when it is needed",
    ".attn.relative_position_index": "a constant, which pair of tokens has which offset, made when it is needed",
    ".attn_mask": "a constant, which tokens of the training size are padding, made when it is needed",
}


def _from_authors(key: str) -> str:
    """Their name of a parameter to ours. Their merging ends a stage, ours begins the next one."""
    parts = key.split(".")
    if parts[0] == "patch_embed":
        parts[0] = "stem"
    elif parts[0] == "head":
        parts[0] = "head.fc"
    elif parts[0] == "layers" and len(parts) > 3:
        parts[0] = "stages"
        if parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + 1) if parts[1].isdecimal() else parts[1]
            parts[3] = {"reductions": "projs"}.get(parts[3], parts[3])
        else:
            parts = [{"ex_conv": "cooling.conv", "ex_ln": "cooling.norm"}.get(part, part) for part in parts]
    return ".".join(parts)


def _init_weights(module: nn.Module, name: str = "") -> None:
    """As the authors': linear layers from a narrow normal, biases 0; convolutions and norms are torch's own."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
