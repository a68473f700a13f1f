"""What a vision model takes: one clear line for whatever it does not."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import register_notrace_function
from torch import Tensor


def stage_indices(indices: int | Sequence[int] | None, stages: int) -> list[int]:
    """Which stages are meant: the last n if an int, all if None; negative ones count from the end."""
    if indices is None:
        return list(range(stages))
    chosen = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
    if not chosen or not all(-stages <= index < stages for index in chosen):
        raise ValueError(f"indices must be stages 0 to {stages - 1}, or how many of the last, got {indices!r}")
    return [index % stages for index in chosen]


@register_notrace_function
def check_images(x: Tensor, in_chans: int) -> Tensor:
    """`x`, if it is a batch of images with the channels that the model takes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"images must have shape (batch, {in_chans}, height, width), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"images must be floating-point, got {x.dtype}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"images must have at least one pixel, got shape {tuple(x.shape)}")
    return x


@register_notrace_function
def check_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """`mask`, if there is none or it tells of every pixel of the images `x` whether it is real."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True = a real pixel), got {got}")
    if mask.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"mask must have shape (batch, height, width) = {(x.shape[0], *x.shape[2:])}, got {tuple(mask.shape)}"
        )
    return mask


def check_count(name: str, value: Any, least: int) -> None:
    """`value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_pyramid(
    in_chans: int,
    num_classes: int,
    dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    stem_stride: int,
    drop_rate: float,
    drop_path_rate: float,
) -> None:
    """The arguments of a pyramid of stages fit each other."""
    check_count("in_chans", in_chans, least=1)
    check_count("num_classes", num_classes, least=0)
    check_count("stem_stride", stem_stride, least=1)
    if not len(dims) == len(depths) == len(num_heads) or not dims:
        raise ValueError(
            "dims, depths and num_heads must have one entry per stage each, "
            f"got {len(dims)}, {len(depths)} and {len(num_heads)} entries"
        )
    for name, values in (("dims", dims), ("depths", depths), ("num_heads", num_heads)):
        for value in values:
            check_count(f"each of {name}", value, least=1)
    if dims[0] % 2:
        raise ValueError(f"dims[0] must be even, as the stem has half as many channels, got {dims[0]}")
    for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {rate}")
