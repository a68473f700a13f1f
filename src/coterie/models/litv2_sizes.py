"""The sizes of LITv2 (`litv2.py`), registered with timm: small, medium and base of the paper, and base at 384 x 384."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from coterie.models._registry import image_cfg, register_vision_model
from coterie.models.litv2 import LITv2


def _cfg(**kwargs: Any) -> dict[str, Any]:
    usual = {
        "crop_pct": 0.875,
        "first_conv": "stem.proj",
        "paper_ids": "arXiv:2205.13213",
        "paper_name": "Fast Vision Transformers with HiLo Attention",
    }
    return image_cfg(**{**usual, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "litv2_small": _cfg(),
        "litv2_medium": _cfg(),
        "litv2_base": _cfg(),
        "litv2_base_384": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0),
    }
)

_BASE: dict[str, Any] = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    for unused in ("img_size", "dynamic_img_size"):  # every size works, nothing is built for one
        kwargs.pop(unused, None)
    feature_cfg = {"out_indices": tuple(range(len(kwargs["dims"]))), "flatten_sequential": True}
    return build_model_with_cfg(LITv2, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_vision_model
def litv2_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LITv2-S: 27,844,000 parameters, 3.7 GMACs at 224 x 224. Equals the authors' released model of that name."""
    args: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
    return _create("litv2_small", pretrained, **{**args, **kwargs})


@register_vision_model
def litv2_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LITv2-M: 48,830,368 parameters, 7.5 GMACs at 224 x 224. Equals the authors' released model of that name."""
    args: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
    return _create("litv2_medium", pretrained, **{**args, **kwargs})


@register_vision_model
def litv2_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LITv2-B: 86,520,704 parameters, 13.2 GMACs at 224 x 224. Equals the authors' released model of that name."""
    return _create("litv2_base", pretrained, **{**_BASE, **kwargs})


@register_vision_model
def litv2_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LITv2-B fine-tuned at 384 x 384: 86,520,704 parameters, 39.7 GMACs there."""
    return _create("litv2_base_384", pretrained, **{**_BASE, **kwargs})
