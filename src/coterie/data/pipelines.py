"""From a picture and its target to a row, and from rows to a batch: one pipeline for each kind of target.

    class       "image", "label"
    label_map   "image", "label_map" (training) or "truth" at the original resolution (evaluation)
    instances   "image", "instances" (training) or "truth" at the original resolution (evaluation)

Dense pictures keep their own size: a batch is as large as its largest picture, the others are padded with zeros on the
right and below, and "mask" then says where there is a picture. The joint transforms of pictures, label maps, boxes and
masks are those of torchvision.transforms.v2 on tv_tensors. Their recipe: scale jitter and crop (G. Ghiasi et al.,
"Simple Copy-Paste", CVPR 2021, for instances; the customary half to double for label maps), mirroring, and the
photometric distortion of SSD (W. Liu et al., ECCV 2016).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from coterie.data.annotations import IGNORE, BadAnnotation, Instances
from coterie.data.images import to_mode
from coterie.data.source import TARGETS, DataSource
from coterie.data.transforms import TransformConfig, build_transforms, settle

PADDING = -1
"""Index and label of the rows that fill up the last batch of an evaluation over several ranks."""

Row = dict[str, Any]
Batch = dict[str, Any]


class Pipeline(ABC):
    """What a Loader does with a picture and its target. Random parts draw from the global generators."""

    @abstractmethod
    def __call__(self, image: Image.Image, target: Any) -> Row:
        """Make a row. Raises BadAnnotation for a target that cannot be used."""

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> Batch:
        """Make a batch of at least one row: tensors with one row, and lists with one entry, for each."""

    def blank(self, row: Row) -> Row:
        """A row without a picture, shaped like another; the Loader gives it the index -1."""
        return {**row, "image": torch.zeros_like(row["image"])}


class ClassPipeline(Pipeline):
    """A transform of pictures, all to one shape, beside their class."""

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image, target: Any) -> Row:
        row = {"image": self.transform(image)}
        return row if target is None else {**row, "label": target}

    def blank(self, row: Row) -> Row:
        return {**super().blank(row), "label": PADDING}

    def collate(self, rows: Sequence[Row]) -> Batch:
        batch = {"image": torch.stack([row["image"] for row in rows])}
        if "label" in rows[0]:
            batch["label"] = torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        return batch


class DensePipeline(Pipeline):
    """What label maps and instances share: geometry, normalisation, padding.

    Args:
        config: settled for a dense source.
        train: augment, and bring the target along; else leave the target at the original resolution.
    """

    def __init__(self, config: TransformConfig, train: bool) -> None:
        from coterie.data.joint import JointTransform

        self.config = config
        self.train = train
        self.joint = JointTransform(config, train)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
        self._factor, self._offset = 1 / (255 * std), mean / std

    def normalize(self, pixels: UInt8[Tensor, "channels height width"]) -> Float[Tensor, "channels height width"]:
        """8-bit pixels to what the model takes."""
        return torch.addcmul(-self._offset, pixels.float(), self._factor)

    def start(self, image: Image.Image) -> tuple[UInt8[Tensor, "channels height width"], Row]:
        """The pixels of a picture, and a row that knows its size."""
        pixels = torch.from_numpy(np.array(to_mode(image, self.config.channels or 3)))
        pixels = pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        return pixels, {"original_size": (image.height, image.width)}

    def finish(self, row: Row, pixels: UInt8[Tensor, "channels height width"]) -> Row:
        """Add the normalised picture and its size to a row."""
        return {"image": self.normalize(pixels), "size": tuple(pixels.shape[-2:]), **row}

    def collate(self, rows: Sequence[Row]) -> Batch:
        sizes = [row["size"] for row in rows]
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        batch: Batch = {"image": torch.stack([pad(row["image"], height, width) for row in rows])}
        if any(size != (height, width) for size in sizes):
            mask = torch.zeros(len(rows), height, width, dtype=torch.bool)
            for one, size in zip(mask, sizes, strict=True):
                one[: size[0], : size[1]] = True
            batch["mask"] = mask
        batch["size"] = torch.tensor(sizes, dtype=torch.int64)
        batch["original_size"] = torch.tensor([row["original_size"] for row in rows], dtype=torch.int64)
        if "label_map" in rows[0]:
            batch["label_map"] = torch.stack([pad(row["label_map"], height, width, IGNORE) for row in rows]).long()
        if "instances" in rows[0]:
            batch["instances"] = [
                {key: pad(value, height, width) if key == "masks" else value for key, value in row["instances"].items()}
                for row in rows
            ]
        if "truth" in rows[0]:
            batch["truth"] = [row["truth"] for row in rows]
        return batch


class LabelMapPipeline(DensePipeline):
    """Pictures with label maps. In evaluation "truth" is the label map of the picture as it lies in the file."""

    def __call__(self, image: Image.Image, target: UInt8[np.ndarray, "height width"] | None) -> Row:
        pixels, row = self.start(image)
        if target is None:
            return self.finish(row, self.joint({"image": pixels})["image"])
        if target.shape != (image.height, image.width):
            raise BadAnnotation(
                f"its label map is {target.shape[1]}x{target.shape[0]}, the picture {image.width}x{image.height}"
            )
        if not self.train:
            row["truth"] = torch.from_numpy(target.astype(np.int64))
            return self.finish(row, self.joint({"image": pixels})["image"])
        moved = self.joint({"image": pixels, "label_map": torch.from_numpy(np.array(target))})
        row["label_map"] = moved["label_map"]
        return self.finish(row, moved["image"])


class InstancesPipeline(DensePipeline):
    """Pictures with boxes and, when `masks`, masks.

    Training leaves out crowds, and objects of which the crop leaves less than a pixel. Evaluation keeps everything, its
    masks as run lengths, which is what evaluators of COCO take.
    """

    def __init__(self, config: TransformConfig, train: bool, masks: bool = False) -> None:
        super().__init__(config, train)
        self.masks = masks

    def __call__(self, image: Image.Image, target: Instances | None) -> Row:
        pixels, row = self.start(image)
        if target is None:
            return self.finish(row, self.joint({"image": pixels})["image"])
        if target.size != (image.height, image.width):
            raise BadAnnotation(
                f"its annotation is for {target.size[1]}x{target.size[0]}, the picture is {image.width}x{image.height}"
            )
        if self.masks and target.segmentations is None:
            raise BadAnnotation("its objects have boxes only; masks are needed")
        if not self.train:
            row["truth"] = {name: torch.from_numpy(np.array(getattr(target, name))) for name in _COLUMNS}
            if self.masks:
                row["truth"]["masks"] = target.masks
            return self.finish(row, self.joint({"image": pixels})["image"])
        if target.crowd.any():
            target = target[~target.crowd]
        moved = {"image": pixels, "boxes": torch.from_numpy(target.boxes)}
        if self.masks:
            moved["masks"] = torch.from_numpy(target.decode())
        moved = self.joint(moved)
        kept = moved.pop("kept")
        row["instances"] = {
            "boxes": moved["boxes"],
            "labels": torch.from_numpy(target.labels)[kept],
            "crowd": torch.from_numpy(target.crowd)[kept],
        }
        if self.masks:
            row["instances"]["masks"] = moved["masks"]
        return self.finish(row, moved["image"])


_COLUMNS = ("boxes", "labels", "crowd", "area")


def pad(pixels: Tensor, height: int, width: int, value: int = 0) -> Tensor:
    """Fill up the last two dimensions on the right and below."""
    missing = width - pixels.shape[-1], height - pixels.shape[-2]
    if not any(missing):
        return pixels
    return torch.nn.functional.pad(pixels, (0, missing[0], 0, missing[1]), value=value)


def build_pipeline(
    source: DataSource | None,
    config: TransformConfig,
    target: str | None = None,
    train: bool = True,
    *,
    masks: bool = False,
) -> Pipeline:
    """Build what a Loader does with each picture.

    Args:
        source: settles what `config` leaves open; None for a configuration that is settled.
        config: see `coterie.data.transforms.TransformConfig`.
        target: one of TARGETS; that of the source unless told.
        train: augment.
        masks: of instances: decode masks too.

    Raises:
        TypeError, ValueError: as `coterie.data.transforms.settle`; ValueError for masks that the source does not have.
    """
    target = target or (source.target if source is not None else "class")
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, takes {', '.join(TARGETS)}")
    if target == "class":
        return ClassPipeline(build_transforms(source, config, train))
    if masks and source is not None and not source.has_masks:
        raise ValueError(f"{source.name}: its objects have boxes only; masks are needed")
    settled = settle(source, config)
    if settled.min_size is None or settled.max_size is None or settled.scale_jitter is None:
        raise ValueError("config: min_size is left open and there is no source to take it from")
    return LabelMapPipeline(settled, train) if target == "label_map" else InstancesPipeline(settled, train, masks)


Truth = Int64[Tensor, "height width"] | dict[str, Any]
"""What evaluation compares with: a label map, or boxes (objects, 4), labels, crowd, area and, when asked for, masks."""
