"""Sets of pictures with label maps or instances, and the rules about annotations that are wrong.

Readers (coco.py, voc.py, maps.py, dense_parquet.py) find pictures and annotations; what is right is decided here, once
for all of them:

    an object whose box is no box, has no area or lies outside the picture,
    whose category is unknown, or whose mask is damaged or of another size   skipped, reported, counted
    an annotation without a picture                                          skipped, reported, counted
    a box that reaches over the edge                                         clipped; reported from one pixel on
    a picture that cannot be read, or is not of the size its annotation says
    a label map of another size than its picture, or with a label that is
    no class                                                                 a bad sample: see loading.py

More than a share of skipped annotations (`max_bad_share`, but one at least) and the set does not open.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coterie.data.annotations import IGNORE, BadAnnotation, Instances, check_segmentation
from coterie.data.images import BadSample, Header, decode_image, read_header
from coterie.data.randomness import permutation
from coterie.data.source import HEADERS_SAMPLED, HOLDOUT_SHARE, DataSource, ImageDataset, Subset, stratified_split
from coterie.data.stores import Store

logger = logging.getLogger("coterie.data")

MAX_BAD_SHARE = 0.01
_REPORTED = 20


class Problems:
    """Annotations that were skipped or mended, reported as they are found."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.skipped: list[str] = []
        self.mended = 0

    def skip(self, name: str, reason: str) -> None:
        """Count an annotation that is left out, and say so."""
        self.skipped.append(f"{name}: {reason}")
        self._report("skipped", len(self.skipped), self.skipped[-1])

    def mend(self, name: str, reason: str) -> None:
        """Count an annotation that is used after a correction, and say so."""
        self.mended += 1
        self._report("mended", self.mended, f"{name}: {reason}")

    def check(self, total: int, max_bad_share: float) -> None:
        """Raise ValueError when more of `total` annotations were skipped than the share allows (one always may)."""
        allowed = max(int(max_bad_share * total + 1e-9), 1) if max_bad_share else 0
        if len(self.skipped) > allowed:
            shown = "; ".join(self.skipped[:3]) + ("; ..." if len(self.skipped) > 3 else "")
            raise ValueError(
                f"{self.where}: {len(self.skipped)} of {total} annotations cannot be used, more than the share of "
                f"{max_bad_share:g} that max_bad_share allows: {shown}"
            )

    def _report(self, what: str, count: int, line: str) -> None:
        if count <= _REPORTED:
            logger.warning("%s %s", what, line)
        elif count == _REPORTED + 1:
            logger.warning("%s: more annotations were %s; from now on they are only counted", self.where, what)


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
            if segmentation:
                check_segmentation(segmentation, size)
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
        self.segmentations.append(segmentation or None)

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


class LabelMapImages(ImageDataset):
    """Pictures with a picture of their labels, file by file.

    Args:
        images, maps: where the files lie.
        files: for each sample the name of its picture and of its label map.
        class_count: number of classes.
        table: class number of each value in the files, IGNORE for none; 256 entries for grey or palette pictures. A
            mapping from (red, green, blue) for pictures whose colours are the classes.
    """

    kind = "label_map"

    def __init__(
        self,
        images: Store,
        maps: Store,
        files: Sequence[tuple[str, str]],
        class_count: int,
        table: UInt8[np.ndarray, " 256"] | Mapping[tuple[int, int, int], int],
    ) -> None:
        self.images, self.maps, self.files = images, maps, list(files)
        self.class_count = class_count
        self.table = table
        self.labels = np.full(len(files), -1, dtype=np.int64)

    def read(self, index: int) -> bytes:
        return self.images.read(self.files[index][0])

    def read_map(self, index: int) -> bytes:
        """The bytes of the label map's file. Raises BadSample."""
        name = self.files[index][1]
        try:
            return self.maps.read(name)
        except OSError as error:
            raise BadSample(self.maps.path(name), error.strerror or str(error)) from error

    def name(self, index: int) -> str:
        return self.images.path(self.files[index][0])

    def map_name(self, index: int) -> str:
        """What people call the label map."""
        return self.maps.path(self.files[index][1])

    def image(self, index: int) -> Image.Image:
        header = read_header(self.read_map(index), self.map_name(index))
        size = header.height, header.width
        return decode_image(read_checked(self, index), self.channels, self.name(index), size)

    def target(self, index: int) -> UInt8[np.ndarray, "height width"]:
        name = self.map_name(index)
        return to_labels(read_values(self.read_map(index), name), self.table, self.class_count, name)


def read_checked(dataset: ImageDataset, index: int) -> bytes:
    """The bytes of a picture. Raises BadSample where there are none."""
    try:
        return dataset.read(index)
    except OSError as error:
        raise BadSample(dataset.name(index), error.strerror or str(error)) from error


def read_values(data: bytes, name: str) -> np.ndarray:
    """The pixels of a label map as they are stored: (height, width) integers, or (height, width, 3) of colours.

    A palette picture gives its indices, not its colours. Raises BadSample.
    """
    import io

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("RGBA", "CMYK", "YCbCr", "LAB"):
                return np.asarray(image.convert("RGB"))
            if image.mode == "1":
                return np.asarray(image.convert("L")) // 255
            values = np.asarray(image)
    except Exception as error:  # as in images.decode_image
        raise BadSample(name, f"not a label map: {' '.join(str(error).split())[:200]}") from error
    if values.dtype.kind not in "ui" or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise BadSample(name, f"a label map of {values.dtype} and shape {values.shape}, takes whole numbers or RGB")
    return values


def to_labels(
    values: np.ndarray,
    table: UInt8[np.ndarray, " 256"] | Mapping[tuple[int, int, int], int],
    class_count: int,
    name: str,
) -> UInt8[np.ndarray, "height width"]:
    """Stored values to class numbers (see LabelMapImages). Raises BadSample for a value that stands for no class."""
    if values.ndim == 3:
        if not isinstance(table, Mapping):
            raise BadSample(name, "the label map is in colours, and no file says which colour is which class")
        return _from_colours(values, table, name)
    if isinstance(table, Mapping):
        raise BadSample(name, "the label map is not in colours, as the set's table of colours says")
    if values.dtype != np.uint8:
        values = np.where(values == 0xFFFF, IGNORE, values)
        if values.max(initial=0) > 0xFF or values.min(initial=0) < 0:
            wrong = int(values[(values > 0xFF) | (values < 0)][0])
            raise BadSample(name, f"label value {wrong} is none of the {class_count} classes")
        values = values.astype(np.uint8)
    labels = table[values]
    wrong_labels = (labels >= class_count) & (labels != IGNORE)
    if wrong_labels.any():
        row, column = (int(place[0]) for place in np.nonzero(wrong_labels))
        raise BadSample(
            name,
            f"label value {int(values[row, column])} at row {row}, column {column} is none of the {class_count} "
            f"classes, takes 0 to {class_count - 1}, or {IGNORE} for pixels to ignore",
        )
    return labels


def _from_colours(values: np.ndarray, table: Mapping[tuple[int, int, int], int], name: str) -> np.ndarray:
    codes = values.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    known = np.array([red << 16 | green << 8 | blue for red, green, blue in table], dtype=np.int32)
    order = np.argsort(known)
    place = np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)
    found = order[place]
    if (known[found] != codes).any():
        row, column = (int(place[0]) for place in np.nonzero(known[found] != codes))
        colour = tuple(values[row, column].tolist())
        raise BadSample(name, f"colour {colour} at row {row}, column {column} stands for no class")
    return np.array(list(table.values()), dtype=np.uint8)[found]


def assemble_dense(
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, ImageDataset],
    *,
    mirror: bool | None = None,
) -> DataSource:
    """Make a DataSource of what a reader found: hold out a tenth where there is no test split, measure sizes.

    Training pictures without any object (crowds aside) are left out, as the usual recipes do; evaluation keeps them.

    Raises:
        ValueError: no training pictures, none with an object, no class, too many classes, none can be read.
    """
    splits = {key: split for key, split in splits.items() if len(split)}
    if "train" not in splits:
        raise ValueError(f"{name}: no training images")
    target = splits["train"].kind
    if not classes or (target == "label_map" and len(classes) >= IGNORE):
        raise ValueError(f"{name}: {len(classes)} classes, takes 1 to {IGNORE - 1}")
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        kept, held_out = stratified_split(splits["train"].labels, HOLDOUT_SHARE)
        if not len(held_out):
            raise ValueError(f"{name}: {len(kept)} images and no test split: too few to hold any out")
        splits["train"], splits["test"] = Subset(splits["train"], kept), Subset(splits["train"], held_out)
    if target == "instances":
        splits["train"] = _with_objects(name, splits["train"])
    headers = _headers(name, splits["train"])
    for split in splits.values():
        split.channels = 3  # detectors and decoders are made for colour; grey pictures repeat their channel
    return DataSource(
        name=name,
        classes=list(classes),
        channels=3,
        native_size=(
            int(np.median([header.height for header in headers])),
            int(np.median([header.width for header in headers])),
        ),
        splits={key: splits[key] for key in ("train", "validation", "test") if key in splits},
        mirror=not all(len(label) == 1 or label.isdecimal() for label in classes) if mirror is None else mirror,
        target=target,
        has_masks=target == "instances" and all(_has_masks(split) for split in splits.values()),
    )


def _has_masks(split: ImageDataset) -> bool:
    while isinstance(split, Subset):
        split = split.dataset
    return bool(getattr(split, "has_masks", False))


def _with_objects(name: str, train: ImageDataset) -> ImageDataset:
    useful = np.array([not train.target(index).crowd.all() for index in range(len(train))])
    if useful.all():
        return train
    if not useful.any():
        raise ValueError(f"{name}: no training image has an object")
    logger.info("%s: %d of %d training images show no object: left out", name, (~useful).sum(), len(useful))
    return Subset(train, np.flatnonzero(useful))


def _headers(name: str, train: ImageDataset) -> list[Header]:
    headers, first_bad = [], None
    for index in permutation(len(train), 0)[:HEADERS_SAMPLED]:
        try:
            headers.append(train.header(int(index)))
        except BadSample as bad:
            first_bad = first_bad or bad
    if not headers:
        raise ValueError(f"{name}: none of the training images looked at can be read, the first: {first_bad}")
    return headers
