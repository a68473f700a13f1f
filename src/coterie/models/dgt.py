"""Dynamic Group Transformer (DGT): a pyramid whose queries form groups by content, each with its own top-k keys.

"Dynamic Group Transformer: A General Vision Transformer Backbone with Dynamic Group Attention", IJCAI 2022, arXiv
2203.03937. No code of the authors is public, and not all of the paper's text: the networks here are a reconstruction
that meets the parameters and FLOPs recalled of all three sizes. docs/models/dgt.md says what is known and what is ours.

    image (B, 3, H, W)
      stem      3 x (3x3 convolution, GELU, BN), the first with stride 2           (B, C/2, H/2, W/2)
      stage 1   3x3 convolution with stride 2, LN, then blocks                     (B, C, H/4, W/4)
      stage 2   the same                                                           (B, 2C, H/8, W/8)
      stage 3   the same                                                           (B, 4C, H/16, W/16)
      stage 4   the same, with global attention                                    (B, 8C, H/32, W/32)
      head      LN, 1x1 convolution to 1280, BN, SiLU, mean over positions, linear

    block       x = x + DWConv(x);  x = x + Attention(LN(x));  x = x + IRFFN(LN(x))     tiny: pre-norm, dot product
                x = x + DWConv(x);  x = x + LN(Attention(x));  x = x + LN(IRFFN(x))     small, base: post-norm, cosine
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers import DropPath, get_device_dtype, register_notrace_module, trunc_normal_
from timm.models import named_apply
from torch import Tensor, nn

from coterie.attention import create_attention
from coterie.layers import ConditionalPositionEncoding, ConvHead, ConvMerging, ConvStem, InvertedResidualFeedForward
from coterie.models._attention_plan import Options, plan_attention
from coterie.models._checks import check_count, check_pyramid
from coterie.models._pyramid import Pyramid, PyramidStage, drop_path_rates

__all__ = ["DynamicGroupTransformer", "DynamicGroupTransformerBlock", "DynamicGroupTransformerStage"]

STAGE_STRIDE = 2
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class DynamicGroupTransformerBlock(nn.Module):
    """Position encoding, attention and feed-forward, each with its residual.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads.
        attention: name of the attention, and `attention_options` for it.
        block_index: the block's place in its stage.
        mlp_ratio: hidden over outer channels of the feed-forward.
        post_norm: normalise what attention and feed-forward give instead of what they get (as Swin V2 does).
        drop_path: share of samples for which a branch is left out in training.

    Shape: token grid (batch, height, width, dim) -> the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        attention: str,
        attention_options: Options,
        block_index: int,
        mlp_ratio: float,
        post_norm: bool,
        drop_path: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.post_norm = post_norm
        self.position = ConditionalPositionEncoding(dim, **dd)
        self.norm1 = LayerNorm(dim, **dd)
        self.attn = create_attention(attention, dim, num_heads, block_index=block_index, **attention_options, **dd)
        register_notrace_module(type(self.attn))  # torch.fx takes attention as one node: it looks at shapes and masks
        self.norm2 = LayerNorm(dim, **dd)
        self.mlp = InvertedResidualFeedForward(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Apply the block. With a mask (True = a real token) padding changes nothing at the other tokens."""
        x = self.position(x, mask)
        if self.post_norm:
            x = x + self.drop_path(self.norm1(self.attn(x, mask=mask)))
            return x + self.drop_path(self.norm2(self.mlp(x, mask)))
        x = x + self.drop_path(self.attn(self.norm1(x), mask=mask))
        return x + self.drop_path(self.mlp(self.norm2(x), mask))


class DynamicGroupTransformerStage(PyramidStage):
    """Patch merging and blocks.

    Shape: feature map (batch, in_dim, H, W) -> (batch, dim, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_heads: int,
        *,
        stride: int,
        drop_path: Sequence[float],
        device=None,
        dtype=None,
        **block: Any,
    ) -> None:
        super().__init__(stride)
        dd = {"device": device, "dtype": dtype}
        self.downsample = ConvMerging(in_dim, dim, stride=stride, **dd)
        self.blocks = nn.Sequential(
            *(
                DynamicGroupTransformerBlock(dim, num_heads, block_index=index, drop_path=rate, **block, **dd)
                for index, rate in enumerate(drop_path)
            )
        )


class DynamicGroupTransformer(Pyramid):
    """A pyramid of Dynamic Group Transformer blocks, with timm's model interface.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (timm's poolings).
        dims, depths, num_heads: channels, blocks and heads of each stage.
        attention: name of the attention of all stages, or one name per stage (`coterie.attention.list_attention()`).
        attention_options: options for it: one mapping, of which each stage takes what its attention knows, or one
            mapping per stage. They go over the model's own, `attention_defaults` (name to one mapping per stage).
        similarity: attention logits, "dot" or "cosine" (queries and keys of length one, learned temperature).
        post_norm: LN after attention and feed-forward instead of before them.
        mlp_ratio: hidden over outer channels of the feed-forward.
        stem_stride: stride of the stem; each stage halves once more. 2 in the paper, 1 for small images.
        head_hidden_size: channels of the 1x1 convolution in the head; 0 leaves it out.
        pool_first: pool before that convolution (another reading of the paper: same parameters, less arithmetic).
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
        depths: Sequence[int] = (1, 2, 17, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        attention: str | Sequence[str] = ("dynamic_group", "dynamic_group", "dynamic_group", "global"),
        attention_options: Options | Sequence[Options] | None = None,
        attention_defaults: Mapping[str, Sequence[Options]] | None = None,
        similarity: str = "dot",
        post_norm: bool = False,
        mlp_ratio: float = 4.0,
        stem_stride: int = 2,
        head_hidden_size: int = 1280,
        pool_first: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_pyramid(in_chans, num_classes, dims, depths, num_heads, stem_stride, drop_rate, drop_path_rate)
        plan = plan_attention(attention, attention_options, attention_defaults or {}, len(dims))
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.feature_info: list[dict[str, Any]] = []
        self.stem_stride = stem_stride

        self.stem = ConvStem(in_chans, dims[0] // 2, stride=stem_stride, **dd)
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for index, (dim, heads, (name, options)) in enumerate(zip(dims, num_heads, plan)):
            stage = DynamicGroupTransformerStage(
                dims[index - 1] if index else dims[0] // 2,
                dim,
                heads,
                stride=STAGE_STRIDE,
                drop_path=rates[index],
                attention=name,
                attention_options={"similarity": similarity, **options},
                mlp_ratio=mlp_ratio,
                post_norm=post_norm,
                **dd,
            )
            stages.append(stage)
            self.feature_info.append(
                {"num_chs": dim, "reduction": stem_stride * STAGE_STRIDE ** (index + 1), "module": f"stages.{index}"}
            )
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        self.norm: nn.Module = LayerNorm(self.num_features, **dd)
        self.head = ConvHead(
            self.num_features,
            num_classes,
            hidden_size=head_hidden_size,
            pool_type=global_pool,
            pool_first=pool_first,
            drop_rate=drop_rate,
            **dd,
        )
        self.head_hidden_size = self.head.num_features
        named_apply(_init_weights, self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new classifier (none for 0 classes), a pooling if given; `reset_other` drops the head's convolution."""
        check_count("num_classes", num_classes, least=0)
        self.num_classes = num_classes
        self.head.reset(
            num_classes, global_pool, reset_other=reset_other, in_features=self.num_features, **get_device_dtype(self)
        )
        self.head_hidden_size = self.head.num_features


def _init_weights(module: nn.Module, name: str = "") -> None:
    """As CMT: linear layers of attention and head from a narrow normal, convolutions by Kaiming, biases 0."""
    if isinstance(module, InvertedResidualFeedForward):  # its linear layers are the paper's 1x1 convolutions
        for layer in (module.expand, module.project):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
