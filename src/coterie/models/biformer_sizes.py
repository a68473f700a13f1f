"""The sizes of BiFormer (`biformer.py`), registered with timm: biformer_tiny, biformer_small, biformer_base, and
biformer_stl, the authors' ablation in the layout of Swin-T."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs
from torch import nn

from coterie.models._registry import image_cfg, register_vision_model
from coterie.models.biformer import BiFormer


def _cfg(**kwargs: Any) -> dict[str, Any]:
    usual = {
        "first_conv": "stem.conv1",
        "paper_ids": "arXiv:2303.08810",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
    }
    return image_cfg(**{**usual, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny": _cfg(),
        "biformer_small": _cfg(),
        "biformer_base": _cfg(),
        "biformer_stl": _cfg(first_conv="stem.conv"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    for unused in ("img_size", "dynamic_img_size"):  # nothing is built for one size
        kwargs.pop(unused, None)
    feature_cfg = {"out_indices": tuple(range(len(kwargs["dims"]))), "flatten_sequential": True}
    return build_model_with_cfg(BiFormer, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_NARROW: dict[str, Any] = {"dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 8)}
_WIDE: dict[str, Any] = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 8)}


@register_vision_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-T: 13,142,760 parameters, 2.216 GMACs at 224 x 224; as the released weights have been trained."""
    return _create("biformer_tiny", pretrained, **{**_NARROW, "depths": (2, 2, 8, 2), **kwargs})


@register_vision_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-S: 25,536,232 parameters, 4.464 GMACs at 224 x 224; as the released weights have been trained."""
    return _create("biformer_small", pretrained, **{**_NARROW, "depths": (4, 4, 18, 4), **kwargs})


@register_vision_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-B: 56,804,968 parameters, 9.759 GMACs at 224 x 224; as the released weights have been trained."""
    return _create("biformer_base", pretrained, **{**_WIDE, "depths": (4, 4, 18, 4), **kwargs})


@register_vision_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL, in Swin-T's layout: 28,372,552 parameters, 4.574 GMACs at 224 x 224; as its weights were trained.

    For the weights of the authors' refactored code ("biformer_stl_nchw"): `global_lepe_of="value"`, and at sizes that
    are no multiples of 112 `uneven="padded_projection"`.
    """
    args = {**_WIDE, "depths": (2, 2, 6, 2), "layout": "swin", "mlp_ratio": 4.0}
    return _create("biformer_stl", pretrained, **{**args, **kwargs})
