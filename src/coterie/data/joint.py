"""Transforms that move a picture, its label map, boxes and masks together, on torchvision.transforms.v2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from coterie.data.transforms import TransformConfig

Moved = dict[str, Tensor]


def evaluation_size(size: tuple[int, int], min_size: int, max_size: int) -> tuple[int, int]:
    """The size of a picture whose shorter side becomes `min_size`, unless its longer side exceeds `max_size` then."""
    scale = _base_scale(size, min_size, max_size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _base_scale(size: tuple[int, int], min_size: int, max_size: int) -> float:
    return min(min_size / min(size), max_size / max(size))


class ScaleJitterCrop(v2.Transform):
    """Resize by a random factor and cut out a random window, in one step that touches only the pixels needed.

    Args:
        min_size, max_size: see `evaluation_size`.
        jitter: least and greatest factor beyond that size.
        crop: greatest (height, width) of the outcome; a smaller picture is not filled up.
    """

    def __init__(self, min_size: int, max_size: int, jitter: tuple[float, float], crop: tuple[int, int]) -> None:
        super().__init__()
        self.min_size, self.max_size, self.jitter, self.crop = min_size, max_size, jitter, crop

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        # Uniform in the logarithm: half and double are as likely.
        low, high = torch.tensor(self.jitter).log().tolist()
        factor = float(torch.empty(()).uniform_(low, high).exp())
        scale = _base_scale((height, width), self.min_size, self.max_size) * factor
        window = []
        for side, greatest in zip((height, width), self.crop, strict=True):
            target = max(round(side * scale), 1)
            shown = min(target, greatest)
            extent = side if shown == target else min(max(round(shown / scale), 1), side)
            start = int(torch.randint(side - extent + 1, ()))
            window.append((start, extent, shown))
        (top, height, out_height), (left, width, out_width) = window
        return {
            "top": top,
            "left": left,
            "height": height,
            "width": width,
            "size": [out_height, out_width],
            "antialias": True,
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.resized_crop, inpt, **params)


class JointTransform:
    """All of it, for a mapping of "image" and, as there are, "label_map", "boxes" and "masks".

    Args:
        config: settled for a dense source.
        train: augment; else only bring the picture to its size.
    """

    def __init__(self, config: TransformConfig, train: bool) -> None:
        assert config.min_size is not None
        assert config.max_size is not None
        assert isinstance(config.image_size, tuple)
        assert config.scale_jitter is not None
        self.train = train
        self.limits = config.min_size, config.max_size
        geometry: list[v2.Transform] = [ScaleJitterCrop(*self.limits, config.scale_jitter, config.image_size)]
        if config.hflip:
            geometry.append(v2.RandomHorizontalFlip(config.hflip))
        if config.vflip:
            geometry.append(v2.RandomVerticalFlip(config.vflip))
        self.geometry = v2.Compose(geometry)
        self.colour = Photometric(config.color_jitter) if config.color_jitter else None

    def __call__(self, sample: Moved) -> Moved:
        """The transformed sample; with boxes also "kept": (objects,) bool, which of them are still there."""
        if not self.train:
            size = (int(sample["image"].shape[-2]), int(sample["image"].shape[-1]))
            wanted = evaluation_size(size, *self.limits)
            return sample if size == wanted else {"image": F.resize_image(sample["image"], list(wanted))}
        moved: Moved = self.geometry(_wrap(sample))
        plain = {name: value.as_subclass(Tensor) for name, value in moved.items()}
        if self.colour is not None:
            plain["image"] = self.colour(plain["image"])
        return _drop_lost(plain) if "boxes" in plain else plain


class Photometric:
    """SSD's distortion: each of brightness, contrast, saturation and hue is changed with probability one half.

    All four are linear in the pixel, so they are one matrix: hue turns the colour in the plane of YIQ, where SSD turns
    it in HSV, which takes ten times as long.

    Args:
        strength: 0.5 is the original: contrast and saturation by up to a half, brightness by an eighth, hue by up to 18
            degrees.
    """

    _LUMA = torch.tensor([0.299, 0.587, 0.114])
    _TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])

    def __init__(self, strength: float) -> None:
        self.ranges = torch.tensor([min(strength / 4, 1), min(strength, 1), min(strength, 1), min(strength / 10, 0.5)])

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (channels, height, width) from 0 to 255, as float."""
        drawn = (torch.rand(4) * 2 - 1) * self.ranges * (torch.rand(4) < 0.5)
        brightness, contrast, saturation = (1 + drawn[:3]).tolist()
        flat = pixels.flatten(1).float()
        luma = self._LUMA if len(flat) == 3 else torch.ones(1)
        offset = (1 - contrast) * brightness * (luma @ flat.mean(1))
        matrix = torch.eye(len(flat))
        if len(flat) == 3:
            matrix = saturation * matrix + (1 - saturation) * luma.expand(3, 3)
            turn = 2 * math.pi * float(drawn[3])
            cos, sin = math.cos(turn), math.sin(turn)
            turned = torch.tensor([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]])
            matrix = torch.linalg.solve(self._TO_YIQ, turned @ self._TO_YIQ) @ matrix
        changed = torch.addmm(offset.expand(len(flat), 1), contrast * brightness * matrix, flat)
        return changed.clamp_(0, 255).view(pixels.shape)


def _wrap(sample: Moved) -> Moved:
    height, width = sample["image"].shape[-2:]
    wrapped: Moved = {"image": tv_tensors.Image(sample["image"])}
    for name in ("label_map", "masks"):
        if name in sample:
            wrapped[name] = tv_tensors.Mask(sample[name])
    if "boxes" in sample:
        wrapped["boxes"] = tv_tensors.BoundingBoxes(
            sample["boxes"], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(height, width)
        )
    return wrapped


def _drop_lost(sample: Moved) -> Moved:
    """Clip boxes to the picture and drop the objects that have less than a pixel left in it."""
    height, width = sample["image"].shape[-2:]
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = sample["boxes"].clamp(min=torch.zeros(4), max=limit)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
    if "masks" in sample:
        kept &= sample["masks"].view(torch.bool).flatten(1).any(1)
        masks = sample["masks"][kept]
        # The crop may have cut off a part; what is left of the mask can be smaller than what is left of the box.
        cut = ((boxes - sample["boxes"]).abs() > 0.5).any(1)[kept]
        boxes = boxes[kept]
        if cut.any():
            boxes[cut] = masks_to_boxes(masks[cut]) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        return {**sample, "boxes": boxes, "masks": masks, "kept": kept}
    return {**sample, "boxes": boxes[kept], "kept": kept}
