"""The sizes of the Dynamic Group Transformer (`dgt.py`), registered with timm: dgt_tiny, dgt_small, dgt_base of the
paper, and dgt_nano and dgt_pico for small images."""

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from coterie.models._attention_plan import Options
from coterie.models._registry import image_cfg, register_vision_model
from coterie.models.dgt import DynamicGroupTransformer


def _cfg(**kwargs: Any) -> dict[str, Any]:
    usual = {
        "first_conv": "stem.conv1",
        "paper_ids": "arXiv:2203.03937",
        "paper_name": "Dynamic Group Transformer: A General Vision Transformer Backbone with Dynamic Group Attention",
    }
    return image_cfg(**{**usual, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "dgt_tiny": _cfg(),
        "dgt_small": _cfg(),
        "dgt_base": _cfg(),
        "dgt_nano": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
        "dgt_pico": _cfg(input_size=(3, 32, 32), pool_size=(2, 2), crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    for unused in ("img_size", "dynamic_img_size"):  # every size works, nothing is built for one
        kwargs.pop(unused, None)
    kwargs.setdefault("attention_defaults", _PAPER)
    feature_cfg = {"out_indices": tuple(range(len(kwargs["dims"]))), "flatten_sequential": True}
    return build_model_with_cfg(DynamicGroupTransformer, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


# What the rival mechanisms are given in the paper's networks, each by its own paper; windows are 7 x 7 by themselves.
_PAPER: dict[str, Sequence[Options]] = {
    "bi_level_routing": (
        {"regions": 7, "top_k": 1},
        {"regions": 7, "top_k": 4},
        {"regions": 7, "top_k": 16},
        {"regions": 1, "top_k": 1},
    ),
    "agent": ({"agents": 3}, {"agents": 4}, {"agents": 7}, {"agents": 7}),
    "hilo": ({"window_size": 8}, {"window_size": 4}, {"window_size": 2}, {"window_size": 1}),
    "cross_shaped_window": ({"stripe_width": 1}, {"stripe_width": 2}, {"stripe_width": 7}, {"stripe_width": 7}),
}
# For 32 x 32 images, whose grids have 16, 8, 4 and 2 tokens a side: each query sees about 32, 16, 16 and 4 keys.
_SMALL_IMAGES: dict[str, Sequence[Options]] = {
    "bi_level_routing": (
        {"regions": 4, "top_k": 2},
        {"regions": 4, "top_k": 4},
        {"regions": 2, "top_k": 4},
        {"regions": 1, "top_k": 1},
    ),
    "agent": ({"agents": 4}, {"agents": 4}, {"agents": 3}, {"agents": 2}),
    "long_short_distance": ({"group_size": 6}, {"group_size": 4}, {"group_size": 4}, {"group_size": 4}),
    "hilo": ({"window_size": 2}, {"window_size": 2}, {"window_size": 1}, {"window_size": 1}),
    "dynamic_group": (
        {"groups": 16, "top_k": 32},
        {"groups": 8, "top_k": 16},
        {"groups": 4, "top_k": 16},
        {"groups": 4, "top_k": 16},
    ),
    "shifted_window": ({"window_size": 6}, {"window_size": 4}, {"window_size": 4}, {"window_size": 4}),
    "cascaded_group": ({"window_size": 6}, {"window_size": 4}, {"window_size": 4}, {"window_size": 4}),
    "cross_shaped_window": ({"stripe_width": 2}, {"stripe_width": 2}, {"stripe_width": 4}, {"stripe_width": 4}),
}


_STABLE: dict[str, Any] = {"post_norm": True, "similarity": "cosine"}


@register_vision_model
def dgt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DGT-T: 24,094,952 parameters, 4.328 GMACs at 224 x 224."""
    return _create("dgt_tiny", pretrained, **{"dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16), **kwargs})


@register_vision_model
def dgt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DGT-S: 51,766,515 parameters, 9.381 GMACs at 224 x 224; post-norm and cosine attention."""
    args = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24), **_STABLE}
    return _create("dgt_small", pretrained, **{**args, **kwargs})


@register_vision_model
def dgt_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DGT-B: 90,282,060 parameters, 16.361 GMACs at 224 x 224; post-norm and cosine attention."""
    args = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32), **_STABLE}
    return _create("dgt_base", pretrained, **{**args, **kwargs})


@register_vision_model
def dgt_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Not in the paper: for images from 32 x 32 up, with grids of 16, 8, 4 and 2 tokens a side there."""
    args: dict[str, Any] = {
        "dims": (32, 64, 128, 192),
        "depths": (2, 6, 2, 1),
        "num_heads": (2, 4, 8, 12),
        "stem_stride": 1,
        "head_hidden_size": 256,
        "attention_defaults": _SMALL_IMAGES,
    }
    return _create("dgt_nano", pretrained, **{**args, **kwargs})


@register_vision_model
def dgt_pico(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Not in the paper: the smallest, for demonstrations; grids as `dgt_nano`."""
    args: dict[str, Any] = {
        "dims": (32, 48, 64, 96),
        "depths": (1, 2, 1, 1),
        "num_heads": (2, 3, 4, 6),
        "stem_stride": 1,
        "head_hidden_size": 128,
        "attention_defaults": _SMALL_IMAGES,
    }
    return _create("dgt_pico", pretrained, **{**args, **kwargs})
