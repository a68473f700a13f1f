"""From a decoded picture to the normalised tensor that a model takes, built from the pieces of timm.data.

A `TransformConfig` says what is wanted; whatever it leaves open (None) is settled by `settle` from the source: the
size it has, the mean and standard deviation measured on it, and light augmentation that suits it. The settled
configuration is plain numbers, so a run can save it and predict later without the source.

    digits and other pictures without a mirror image   no flips
    a source with a background (digits)                a small rotation, shift and zoom, filled with the background
    up to 64 pixels, trained at about their size       padding by an eighth (reflected) and a random crop back to size
    larger                                             a random crop of 25 to 100 % of the area, light colour jitter
    label maps, instances                              see pipelines.py: scale jitter, crop, mirror, photometric
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor

from coterie.data.images import MODES, to_mode
from coterie.data.opening import check_size
from coterie.data.source import DataSource

SMALL = 64
CROPS = ("none", "pad", "random_resized")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos", "random")


@dataclass(frozen=True)
class TransformConfig:
    """What is done to pictures. None everywhere means: as suits the source.

    Pictures of a dense set (label maps, instances) are not squeezed to one size: in evaluation their shorter side
    becomes `min_size`, or less where the longer one would exceed `max_size`; in training that size is multiplied by a
    random factor within `scale_jitter`, and at most `image_size` of it is cut out. `crop`, `scale`, `affine`,
    `auto_augment`, `erase` and `crop_pct` are for classification alone.

    Attributes:
        image_size: side of a square, or (height, width), in pixels; of a dense set the training crop. One number for
            instances is the shorter side, and stands for `min_size`.
        channels: 1 or 3; grey becomes colour by repeating it, colour becomes grey by its luma (ITU-R 601).
        crop: of training: "random_resized", "pad" (pad by an eighth, crop back) or "none".
        scale: least and greatest share of the area that "random_resized" keeps.
        hflip, vflip: probability of mirroring left-right and of turning upside down.
        affine: greatest rotation (degrees), shift (share of the side) and zoom (0.1: 0.9 to 1.1).
        color_jitter: strength of changes in brightness, contrast and saturation (and hue in a dense set).
        auto_augment: timm's notation ("rand-m9-mstd0.5-inc1"); with it colour jitter is left out, as timm does.
        erase: probability of blanking out a rectangle.
        interpolation: of every resize.
        crop_pct: in evaluation, share of the (resized) side that the centre crop keeps.
        mean, std: by channel, for pixels from 0 to 1.
        pretrained: take ImageNet's mean and std where none are given, because the weights were trained with them.
        fill: grey value 0 to 255 that rotation and padding bring in.
        min_size, max_size: of a dense set: shorter side of a picture, and limit of the longer one.
        scale_jitter: of a dense set: least and greatest random factor.
    """

    image_size: int | tuple[int, int] | None = None
    channels: int | None = None
    crop: str | None = None
    scale: tuple[float, float] = (0.25, 1.0)
    hflip: float | None = None
    vflip: float = 0.0
    affine: tuple[float, float, float] | None = None
    color_jitter: float | None = None
    auto_augment: str | None = None
    erase: float = 0.0
    interpolation: str | None = None
    crop_pct: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pretrained: bool = False
    fill: int | None = None
    min_size: int | None = None
    max_size: int | None = None
    scale_jitter: tuple[float, float] | None = None


class Transform:
    """A picture to a float tensor (channels, height, width). Random parts draw from the global generators."""

    def __init__(
        self, picture: Callable[[Image.Image], Image.Image], finish: Callable[[Tensor], Tensor], config: TransformConfig
    ) -> None:
        self.config = config
        self._picture = picture
        self._finish = finish
        # 255 is folded in: one multiplication and one addition for each pixel.
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
        self._factor, self._offset = 1 / (255 * std), mean / std

    def __call__(self, image: Image.Image) -> Float[Tensor, "channels height width"]:
        image = self._picture(to_mode(image, self.config.channels or 3))
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return self._finish(torch.addcmul(-self._offset, pixels.float(), self._factor))


def settle(source: DataSource | None, config: TransformConfig) -> TransformConfig:
    """Fill in everything that `config` leaves open. `source` may be None for a configuration that is settled already.

    Raises:
        TypeError: `config` is no TransformConfig.
        ValueError: a value out of its range, or something left open with no source to ask.
    """
    if not isinstance(config, TransformConfig):
        raise TypeError(f"config: got {type(config).__name__}, takes a TransformConfig")
    _check(config)
    if source is None:
        open_fields = [name for name, value in vars(config).items() if value is None and name not in _MAY_BE_NONE]
        if open_fields:
            raise ValueError(f"config: {open_fields[0]} is left open and there is no source to take it from")
        return config
    if source.target != "class":
        return _settle_dense(source, config)
    channels = config.channels or source.channels
    height, width = check_size(config.image_size) or source.native_size
    small = max(height, width) <= SMALL and min(source.native_size) <= 1.5 * min(height, width)
    mean, std = _mean_and_std(source, config, channels)
    with_background = source.background is not None
    fill = source.background if with_background else round(255 * sum(mean) / len(mean))
    crop = config.crop or ("none" if with_background else "pad" if small else "random_resized")
    settled = replace(
        config,
        image_size=(height, width),
        channels=channels,
        crop=crop,
        hflip=config.hflip if config.hflip is not None else 0.5 if source.mirror else 0.0,
        affine=config.affine or ((10.0, 1 / 16, 0.1) if with_background else (0.0, 0.0, 0.0)),
        color_jitter=config.color_jitter if config.color_jitter is not None else 0.0 if small else 0.2,
        crop_pct=config.crop_pct or (0.875 if crop == "random_resized" else 1.0),
        interpolation=config.interpolation or "bicubic",
        mean=tuple(mean),
        std=tuple(std),
        fill=config.fill if config.fill is not None else fill,
    )
    _check(settled)
    return settled


_MAY_BE_NONE = ("auto_augment", "min_size", "max_size", "scale_jitter")


def _mean_and_std(
    source: DataSource, config: TransformConfig, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = config.mean, config.std
    if mean is None or std is None:
        own_mean, own_std = _imagenet(channels) if config.pretrained else source.statistics(channels)
        mean, std = mean or own_mean, std or own_std
    return mean, std


def _settle_dense(source: DataSource, config: TransformConfig) -> TransformConfig:
    """As `settle`, for label maps and instances.

    The sizes are those of the median picture, up to the customary 512x1024 crop of label maps (Cityscapes) and the
    800 (at most 1333) pixels of detectors; crops are multiples of 32, the stride of the last stage.
    """
    for name, none in (("crop", "none"), ("affine", (0.0, 0.0, 0.0)), ("auto_augment", None), ("erase", 0.0)):
        value = getattr(config, name)
        if value is not None and value != none:
            raise ValueError(f"{name}: got {value!r}, which is for classification; {source.name} has {source.target}")
    boxes = source.target == "instances"
    short, long = min(source.native_size), max(source.native_size)
    min_size = config.min_size
    if min_size is None and boxes and config.image_size is not None:
        min_size = config.image_size if isinstance(config.image_size, int) else min(config.image_size)
    if min_size is None:
        min_size = min(short, 800 if boxes else 1024)
    # Neither limit shrinks a picture of the median shape.
    max_size = config.max_size or round(min_size * max(long / short, 5 / 3 if boxes else 4))
    scale = min_size / short
    whole = [max(side * scale / 32, 1) for side in source.native_size]
    if boxes:
        crop = (32 * math.ceil(whole[0] - 1e-6), 32 * math.ceil(whole[1] - 1e-6))
        given = None if isinstance(config.image_size, int) else check_size(config.image_size)
    else:
        crop = (min(32 * int(whole[0]), 512), min(32 * int(whole[1]), 1024))
        given = check_size(config.image_size)
    channels = config.channels or source.channels
    mean, std = _mean_and_std(source, config, channels)
    settled = replace(
        config,
        image_size=given or crop,
        channels=channels,
        crop="none",
        hflip=config.hflip if config.hflip is not None else 0.5 if source.mirror else 0.0,
        affine=(0.0, 0.0, 0.0),
        color_jitter=config.color_jitter if config.color_jitter is not None else 0.5,
        interpolation="bilinear",
        crop_pct=1.0,
        mean=tuple(mean),
        std=tuple(std),
        fill=config.fill if config.fill is not None else 0,
        min_size=min_size,
        max_size=max_size,
        scale_jitter=config.scale_jitter or ((0.8, 1.25) if boxes else (0.5, 2.0)),
    )
    _check(settled)
    return settled


def build_transforms(
    source: DataSource | None, config: TransformConfig, train: bool
) -> Callable[[Image.Image], Float[Tensor, "channels height width"]]:
    """Build the transform of training (random) or of evaluation (a resize and a centre crop). Raises as `settle`."""
    from timm.data import create_transform
    from torchvision import transforms

    settled: Any = settle(source, config)  # Any: none of its fields is None any more, which the type cannot tell
    if not train:
        evaluation = create_transform(
            settled.image_size, interpolation=_fixed(settled), crop_pct=settled.crop_pct, normalize=False
        )
        return Transform(transforms.Compose(evaluation.transforms[:-1]), _identity, settled)
    try:
        crop, colour, final = create_transform(
            settled.image_size,
            is_training=True,
            separate=True,
            scale=settled.scale,
            hflip=settled.hflip,
            vflip=settled.vflip,
            color_jitter=settled.color_jitter if settled.color_jitter else None,  # type: ignore[arg-type]
            auto_augment=settled.auto_augment,
            interpolation=settled.interpolation,
            mean=settled.mean,
            std=settled.std,
            re_prob=settled.erase,
            re_mode="const",
        )
    except (AssertionError, KeyError, ValueError, IndexError) as error:  # timm's, for a notation it cannot read
        raise ValueError(
            f"auto_augment: got {settled.auto_augment!r}, takes timm's notation such as 'rand-m9-mstd0.5-inc1'"
        ) from error
    steps = crop.transforms
    if settled.crop != "random_resized":
        steps = [*_plain_crop(settled), *steps[1:]]
    # timm's last steps are to tensor, normalise, erase; Transform does the first two faster.
    erase = final.transforms[2] if settled.erase else _identity
    return Transform(transforms.Compose([*steps, *_affine(settled, transforms), *colour.transforms]), erase, settled)


def _plain_crop(config: Any) -> list[Any]:
    """Resize and centre crop to size; for "pad" then pad by an eighth and crop at random back to it."""
    height, width = config.image_size
    steps: list[Any] = [_Fit((height, width), _fixed(config))]
    if config.crop == "pad":
        steps.append(_ShiftReflected(height // 8, width // 8))
    return steps


class _Fit:
    """Resize until the picture covers the size, then cut out its centre; nothing to do for one that has the size."""

    def __init__(self, size: tuple[int, int], interpolation: str) -> None:
        from timm.data.transforms import ResizeKeepRatio
        from torchvision.transforms import CenterCrop

        self.size = size
        self.resize = ResizeKeepRatio(size, interpolation=interpolation)
        self.crop = CenterCrop(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        if (image.height, image.width) == self.size:
            return image
        return self.crop(self.resize(image))


class _ShiftReflected:
    """Pad every side by reflection and crop back at random: a shift by at most so many pixels.

    The same as torchvision's RandomCrop with padding, in a tenth of its time, which for small pictures is most of the
    work.
    """

    def __init__(self, vertical: int, horizontal: int) -> None:
        self.most = vertical, horizontal

    def __call__(self, image: Image.Image) -> Image.Image:
        down, right = (random.randint(-most, most) for most in self.most)
        pixels = np.asarray(image).take(_reflected(image.height, down), 0).take(_reflected(image.width, right), 1)
        return Image.fromarray(pixels)


def _reflected(length: int, shift: int) -> Int64[np.ndarray, " {length}"]:
    """Numbers 0 to length - 1, shifted, and reflected where they leave that range."""
    indices = np.abs(np.arange(shift, shift + length))
    return np.minimum(indices, 2 * (length - 1) - indices)


def _affine(config: Any, transforms: Any) -> list[Any]:
    degrees, shift, zoom = config.affine
    if not any(config.affine):
        return []
    return [
        transforms.RandomAffine(
            degrees,
            translate=(shift, shift) if shift else None,
            scale=(1 - zoom, 1 + zoom) if zoom else None,
            interpolation=transforms.InterpolationMode.BILINEAR,
            fill=config.fill,
        )
    ]


def _identity(image: Tensor) -> Tensor:
    return image


def _fixed(config: TransformConfig) -> str:
    return "bicubic" if config.interpolation in ("random", None) else str(config.interpolation)


def _imagenet(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    if channels == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)


def _check(config: TransformConfig) -> None:
    check_size(config.image_size)
    if config.channels is not None and config.channels not in MODES:
        raise ValueError(f"channels: got {config.channels}, takes 1 (grey) or 3 (RGB)")
    for name, allowed in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name}: got {value!r}, takes {', '.join(allowed)}")
    for name in ("hflip", "vflip", "erase"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value}, takes a probability from 0 to 1")
    if not 0 < config.scale[0] <= config.scale[1] <= 1:
        raise ValueError(f"scale: got {config.scale}, takes two shares of the area, 0 < least <= greatest <= 1")
    if config.crop_pct is not None and not 0 < config.crop_pct <= 1:
        raise ValueError(f"crop_pct: got {config.crop_pct}, takes a share above 0, at most 1")
    if config.color_jitter is not None and config.color_jitter < 0:
        raise ValueError(f"color_jitter: got {config.color_jitter}, takes a strength of at least 0")
    if config.affine is not None and not (
        len(config.affine) == 3 and config.affine[0] >= 0 and all(0 <= part < 1 for part in config.affine[1:])
    ):
        raise ValueError(f"affine: got {config.affine}, takes degrees >= 0, and shift and zoom from 0 up to 1")
    for name in ("mean", "std"):
        value = getattr(config, name)
        if value is not None and config.channels is not None and len(value) != config.channels:
            raise ValueError(f"{name}: got {len(value)} values, takes one for each of the {config.channels} channels")
    if config.std is not None and min(config.std) <= 0:
        raise ValueError(f"std: got {config.std}, takes values above 0")
    for name in ("min_size", "max_size"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: got {value!r}, takes a positive number of pixels")
    if config.min_size is not None and config.max_size is not None and config.min_size > config.max_size:
        raise ValueError(f"max_size: got {config.max_size}, takes at least min_size, {config.min_size}")
    if config.scale_jitter is not None and not 0 < config.scale_jitter[0] <= config.scale_jitter[1]:
        raise ValueError(f"scale_jitter: got {config.scale_jitter}, takes two factors, 0 < least <= greatest")
    if config.fill is not None and not 0 <= config.fill <= 255:
        raise ValueError(f"fill: got {config.fill}, takes a grey value from 0 to 255")
