"""The names of this library's vision models. Registering here registers with timm too."""

import difflib
from collections.abc import Callable
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import register_model
from torch import nn

_NAMES: list[str] = []
Entrypoint = Callable[..., nn.Module]


def register_vision_model(entrypoint: Entrypoint) -> Entrypoint:
    """Decorator: register a model's entry point, by its function name, here and with timm."""
    _NAMES.append(entrypoint.__name__)
    return register_model(entrypoint)


def image_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's description of a classifier of images, for `generate_default_cfgs`: the usual, and `kwargs` over it."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


def list_models() -> list[str]:
    """Names of the vision models of this library, sorted."""
    return sorted(_NAMES)


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """Build a vision model by name: one of `list_models()`, or any that timm knows.

    Args:
        name: the model's name.
        **kwargs: as timm.create_model takes them (`num_classes`, `in_chans`, `features_only`, `drop_path_rate`, ...),
            and whatever the model's class takes.

    Raises:
        TypeError: `name` is no str, or an argument is one that the model does not take.
        ValueError: no model has that name; the nearest names are given.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, [*_NAMES, *timm.list_models()], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"coterie has {', '.join(list_models())}"
        raise ValueError(f"no model is named {name!r}: {hint}")
    return timm.create_model(name, **kwargs)
