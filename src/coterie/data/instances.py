"""Pictures with boxes and masks: what is right is decided here, once for all readers (see dense.py for the rules)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from coterie.data.annotations import BadAnnotation, Instances, check_segmentation
from coterie.data.dense import Problems, read_checked
from coterie.data.images import decode_image
from coterie.data.source import ImageDataset
from coterie.data.stores import Store

logger = logging.getLogger("coterie.data")


class Picture(NamedTuple):
    """A picture that an annotation file names, its (height, width) there, and the number of its first object."""

    file: str
    size: tuple[int, int]
    start: int


@dataclass
class InstanceTable:
    """Pictures and objects of one split, as a reader adds them: each picture, then its objects.

    Attributes:
        where: the annotation file or folder, for people.
        class_count: labels run from 0 to this.
    """

    where: str
    class_count: int
    pictures: list[Picture] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    segmentations: list[Any] = field(default_factory=list)
    seen: int = 0

    def __post_init__(self) -> None:
        self.problems = Problems(self.where)

    def add_picture(self, file: str, size: tuple[int, int]) -> None:
        """Add a picture; the objects that follow are its own."""
        self.pictures.append(Picture(file, size, len(self.labels)))

    def add_object(
        self,
        name: str,
        box: Any,
        label: int | None,
        *,
        crowd: bool = False,
        area: Any = None,
        segmentation: Any = None,
        category: Any = None,
    ) -> None:
        """Check an object of the last picture and add it, or skip it with a report.

        Args:
            name: what to call the annotation: file, number, picture.
            box: left, top, right, bottom in pixels.
            label: class number; None where `category` is unknown.
            crowd, area, segmentation: see Instances; an area of None is that of the box.
        """
        self.seen += 1
        size = self.pictures[-1].size
        try:
            if label is None or not 0 <= label < self.class_count:
                raise BadAnnotation(f"unknown category {label if category is None else category!r}")
            corners, excess = _clip(box, size)
            segmentation = check_segmentation(segmentation, size) if segmentation else None
        except BadAnnotation as error:
            self.problems.skip(name, str(error))
            return
        if excess > 1:
            self.problems.mend(name, f"box reaches {excess:g} pixels over the edge of the picture; clipped")
        left, top, right, bottom = corners
        good_area = isinstance(area, int | float) and not isinstance(area, bool) and 0 < area < float("inf")
        self.boxes.append(corners)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.area.append(float(area) if good_area else (right - left) * (bottom - top))
        self.segmentations.append(segmentation)

    def finish(self, store: Store, max_bad_share: float) -> InstanceImages:
        """The dataset. Raises ValueError when too many annotations were skipped."""
        self.problems.check(self.seen, max_bad_share)
        missing = [index for index, segmentation in enumerate(self.segmentations) if segmentation is None]
        has_masks = bool(self.labels) and len(missing) <= max_bad_share * len(self.labels)
        if not has_masks and len(missing) < len(self.labels):
            logger.warning(
                "%s: %d of %d objects have no mask: opened with boxes only", self.where, len(missing), len(self.labels)
            )
        return InstanceImages(self, store, has_masks)


def _clip(box: Any, size: tuple[int, int]) -> tuple[tuple[float, float, float, float], float]:
    """A box inside the picture, and by how many pixels it reached out of it. Raises BadAnnotation."""
    try:
        left, top, right, bottom = (float(side) for side in box)
    except (TypeError, ValueError):
        raise BadAnnotation(f"box {box!r} is not four numbers") from None
    shown = f"box {left:g}, {top:g} to {right:g}, {bottom:g}"
    if not all(abs(side) < float("inf") for side in (left, top, right, bottom)):
        raise BadAnnotation(f"{shown} is not of finite numbers")
    if right <= left or bottom <= top:
        raise BadAnnotation(f"{shown} has no area")
    height, width = size
    inside = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise BadAnnotation(f"{shown} lies outside the picture of {width}x{height}")
    return inside, max(-left, -top, right - width, bottom - height)


class InstanceImages(ImageDataset):
    """Pictures with boxes and, where `has_masks`, masks. All annotations are in memory; pictures are not."""

    kind = "instances"

    def __init__(self, table: InstanceTable, store: Store, has_masks: bool) -> None:
        count = len(table.pictures)
        self.store = store
        self.has_masks = has_masks
        self.files = [picture.file for picture in table.pictures]
        self.sizes = np.array([picture.size for picture in table.pictures], dtype=np.int64).reshape(count, 2)
        self.starts = np.array([picture.start for picture in table.pictures] + [len(table.labels)], dtype=np.int64)
        self.labels = np.full(count, -1, dtype=np.int64)
        self.boxes = np.array(table.boxes, dtype=np.float32).reshape(-1, 4)
        self.object_labels = np.array(table.labels, dtype=np.int64)
        self.crowd = np.array(table.crowd, dtype=bool)
        self.area = np.array(table.area, dtype=np.float32)
        self.segmentations = table.segmentations if has_masks else None

    def read(self, index: int) -> bytes:
        return self.store.read(self.files[index])

    def name(self, index: int) -> str:
        return self.store.path(self.files[index])

    def image(self, index: int) -> Image.Image:
        height, width = self.sizes[index].tolist()
        return decode_image(read_checked(self, index), self.channels, self.name(index), (height, width))

    def target(self, index: int) -> Instances:
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        segmentations = None if self.segmentations is None else self.segmentations[part]
        columns = self.boxes[part], self.object_labels[part], self.crowd[part], self.area[part]
        height, width = self.sizes[index].tolist()
        instances = Instances((height, width), *columns, segmentations)
        if segmentations is not None and any(segmentation is None for segmentation in segmentations):
            instances = instances[np.array([segmentation is not None for segmentation in segmentations])]
        return instances
