"""The published sizes of CrossFormer and CrossFormer++ (`crossformer.py`), registered with timm."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from coterie.models._registry import image_cfg, register_vision_model
from coterie.models.crossformer import CrossFormer


def _cfg(**kwargs: Any) -> dict[str, Any]:
    usual = {
        "crop_pct": 0.875,
        "first_conv": "stem.projs.0",
        "license": "mit",
        "paper_ids": "arXiv:2108.00154",
        "paper_name": "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
    }
    return image_cfg(**{**usual, **kwargs})


_PLUS_PLUS_PAPER = {
    "paper_ids": "arXiv:2303.06908",
    "paper_name": "CrossFormer++: A Versatile Vision Transformer Hinging on Cross-scale Attention",
}
default_cfgs = generate_default_cfgs(
    {
        **{f"crossformer_{size}": _cfg() for size in ("tiny", "small", "base", "large")},
        **{f"crossformer_pp_{size}": _cfg(**_PLUS_PLUS_PAPER) for size in ("small", "base", "large", "huge")},
    }
)

# Progressive group sizes: at 224 x 224 the third stage attends globally in every block.
_PLUS_PLUS: dict[str, Any] = {"group_size": (4, 4, 14, 7), "interval": (4, 2, 1, 1), "cooling": True}
_NARROW: dict[str, Any] = {"dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)}
_MIDDLE: dict[str, Any] = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_WIDE: dict[str, Any] = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    for unused in ("img_size", "dynamic_img_size"):  # every size works, nothing is built for one
        kwargs.pop(unused, None)
    feature_cfg = {"out_indices": tuple(range(len(kwargs["dims"]))), "flatten_sequential": True}
    return build_model_with_cfg(CrossFormer, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_vision_model
def crossformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer-T: 27,776,794 parameters, 2.870 GMACs at 224 x 224."""
    return _create("crossformer_tiny", pretrained, **{"depths": (1, 1, 8, 6), **_NARROW, **kwargs})


@register_vision_model
def crossformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer-S: 30,657,394 parameters, 4.925 GMACs at 224 x 224."""
    return _create("crossformer_small", pretrained, **{"depths": (2, 2, 6, 2), **_MIDDLE, **kwargs})


@register_vision_model
def crossformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer-B: 51,971,554 parameters, 9.188 GMACs at 224 x 224."""
    return _create("crossformer_base", pretrained, **{"depths": (2, 2, 18, 2), **_MIDDLE, **kwargs})


@register_vision_model
def crossformer_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer-L: 91,971,184 parameters, 16.146 GMACs at 224 x 224."""
    return _create("crossformer_large", pretrained, **{"depths": (2, 2, 18, 2), **_WIDE, **kwargs})


@register_vision_model
def crossformer_pp_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer++-S: 23,325,340 parameters, 4.451 GMACs at 224 x 224."""
    return _create("crossformer_pp_small", pretrained, **{"depths": (2, 2, 18, 2), **_NARROW, **_PLUS_PLUS, **kwargs})


@register_vision_model
def crossformer_pp_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer++-B: 51,994,594 parameters, 9.626 GMACs at 224 x 224."""
    return _create("crossformer_pp_base", pretrained, **{"depths": (2, 2, 18, 2), **_MIDDLE, **_PLUS_PLUS, **kwargs})


@register_vision_model
def crossformer_pp_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer++-L: 92,001,904 parameters, 16.768 GMACs at 224 x 224."""
    return _create("crossformer_pp_large", pretrained, **{"depths": (2, 2, 18, 2), **_WIDE, **_PLUS_PLUS, **kwargs})


@register_vision_model
def crossformer_pp_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CrossFormer++-H: 95,962,944 parameters, 22.073 GMACs at 224 x 224."""
    return _create("crossformer_pp_huge", pretrained, **{"depths": (6, 6, 18, 2), **_WIDE, **_PLUS_PLUS, **kwargs})
