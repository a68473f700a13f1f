"""What the dense tasks share: the backbone that a configuration means, normalisation, pictures with class colours."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from coterie.models.backbone import Backbone
from coterie.tasks import Batch

if TYPE_CHECKING:
    from PIL import Image

GOLDEN_RATIO = 0.618033988749895
BACKGROUND_NAMES = ("background", "void", "unlabeled", "unlabelled")
CHANNELS_PER_GROUP = 8
ROW = 18  # pixels of a line of the legend


def build_backbone(config: Any, source: Any, *, frozen_batch_norm: bool) -> Backbone:
    """The backbone `config.name` with `config.options` and `config.drop_path`, for the channels of `source`.

    Raises:
        ValueError: an unknown model, options it does not take, or one that has no four maps.
    """
    options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    return Backbone(config.name, source.channels, frozen_batch_norm=frozen_batch_norm, **{**options, **config.options})


def without_padding(batch: Batch) -> list[Float[Tensor, "images channels height width"]]:
    """The images of a batch for evaluation: together where none is padded, else each alone, cut to its size.

    So an answer does not depend on what else is in the batch. In training it does a little: the group normalisation and
    the convolutions of decoders and heads see padding (the backbone does not).
    """
    images = batch["image"]
    if batch.get("mask") is None:
        return [images]
    return [
        image[None, :, :height, :width] for image, (height, width) in zip(images, batch["size"].tolist(), strict=True)
    ]


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with 8 channels a group (the usual 32 groups at 256 channels).

    With fewer, a map of one position would be normalised to signs.
    """
    return nn.GroupNorm(max(1, channels // CHANNELS_PER_GROUP), channels)


def group_normalised(module: nn.Module) -> nn.Module:
    """`module` with `group_norm` for every batch and group normalisation inside, so that one image is a batch."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, group_norm(child.num_features))
            elif isinstance(child, nn.GroupNorm):
                setattr(parent, name, group_norm(child.num_channels))
    return module


def class_colors(classes: Sequence[str]) -> UInt8[np.ndarray, "classes 3"]:
    """One colour per class, always the same: hues a golden ratio apart, in three brightnesses; background is black."""
    colors = np.zeros((len(classes), 3), dtype=np.uint8)
    for number, name in enumerate(classes):
        if name.lower() in BACKGROUND_NAMES:
            continue
        lightness = (0.5, 0.38, 0.62)[number // 3 % 3]
        red, green, blue = colorsys.hls_to_rgb(number * GOLDEN_RATIO % 1.0, lightness, 0.85)
        colors[number] = [round(255 * part) for part in (red, green, blue)]
    return colors


def with_legend(image: Image.Image, entries: Sequence[tuple[str, Sequence[int]]]) -> Image.Image:
    """The image above rows of colour patches with their names, as many to a row as fit its width."""
    from PIL import Image, ImageDraw, ImageFont

    if not entries:
        return image
    font = ImageFont.load_default(12)
    draw = ImageDraw.Draw(image)
    places = []
    x, row = 4, 0
    for name, _ in entries:
        width = int(draw.textlength(name, font=font)) + 28
        if x > 4 and x + width > image.width:
            x, row = 4, row + 1
        places.append((x, row))
        x += width
    canvas = Image.new("RGB", (image.width, image.height + (row + 1) * ROW + 6), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for (name, color), (x, row) in zip(entries, places, strict=True):
        y = image.height + 4 + row * ROW
        draw.rectangle((x, y + 2, x + 11, y + 13), fill=tuple(int(part) for part in color), outline="#555555")
        draw.text((x + 16, y), name, fill="black", font=font)
    return canvas
