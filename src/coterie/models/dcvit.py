"""DCViT: timm's VisionTransformer whose attention heads compose.

The paper of Dynamically Composable Multi-Head Attention (arXiv 2405.08553) names a DCViT for ImageNet; its code is not
public. Here it is timm's own class, with all that timm offers, and "composable" of `coterie.attention` in every block.
The maps over the heads start nearly as the identity, so that training starts as that of a ViT.
"""

from typing import Any

from jaxtyping import Float
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import PatchEmbed, register_notrace_function, register_notrace_module, resample_abs_pos_embed
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from coterie.attention import ComposableMultiHeadAttention, replace_attention
from coterie.models._checks import check_images
from coterie.models._registry import register_vision_model

__all__ = ["ComposableVisionTransformer"]


# One node each for torch.fx, which cannot follow them: they look at shapes and masks.
register_notrace_module(ComposableMultiHeadAttention)
register_notrace_function(resample_abs_pos_embed)


class ImagePatchEmbed(PatchEmbed):
    """timm's, which says what is wrong with an image that it cannot take."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        return super().forward(check_images(x, self.proj.in_channels))


class ComposableVisionTransformer(VisionTransformer):
    """timm's VisionTransformer with composable multi-head attention.

    Args:
        *args, **kwargs: of timm's VisionTransformer. Images of any size are taken (`dynamic_img_size`) unless it is
            False.
        attention_options: of `coterie.attention.ComposableMultiHeadAttention`: `rank`, `uses`, `sides`, `static`, ...

    Raises:
        ValueError: something that composable attention does not do: dropped or normalised attention weights.
    """

    def __init__(self, *args: Any, attention_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **{"dynamic_img_size": True, "embed_layer": ImagePatchEmbed, **kwargs})
        report = replace_attention(self, "composable", **(attention_options or {}))
        for name, reason in report.skipped.items():
            raise ValueError(f"{name} cannot be composable: {reason}")

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should spare, beyond those of one dimension."""
        return {name for name in super().no_weight_decay() if getattr(self, name, None) is not None}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2405.08553",
        "paper_name": "Improving Transformers with Dynamically Composable Multi-Head Attention",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"dcvit_tiny": _cfg(), "dcvit_small": _cfg(), "dcvit_base": _cfg()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        ComposableVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_vision_model
def dcvit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-Ti/16 with composable attention: 192 channels, 3 heads."""
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("dcvit_tiny", pretrained, **{**sizes, **kwargs})


@register_vision_model
def dcvit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-S/16 with composable attention: 384 channels, 6 heads."""
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("dcvit_small", pretrained, **{**sizes, **kwargs})


@register_vision_model
def dcvit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ViT-B/16 with composable attention: 768 channels, 12 heads."""
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create("dcvit_base", pretrained, **{**sizes, **kwargs})
