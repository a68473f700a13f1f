"""What a picture of a dense set is annotated with: a label map, or instances with boxes and masks.

A label map is a numpy array (height, width) of class numbers, `IGNORE` where nothing is known. Instances hold boxes in
pixels and, where the set has them, masks in the run-length encoding of COCO, which is what its evaluators take.
A mask may be written in any of COCO's three ways (polygons, run lengths as a list, run lengths as text); they become
one when they are asked for, because most of the time nobody asks. The codec is pycocotools.

Format: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and cocodataset.org/#format-data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8

IGNORE = 255
"""The label of pixels that count neither in training nor in evaluation. So there are at most 255 classes."""

RLE = dict[str, Any]
"""A mask as pycocotools takes it: {"size": [height, width], "counts": bytes}."""


class BadAnnotation(ValueError):
    """An annotation that cannot be used; the message says why, whoever knows the file adds its name."""


@dataclass(frozen=True)
class Instances:
    """The objects of one picture.

    Attributes:
        size: (height, width) of the picture that boxes and masks refer to.
        boxes: left, top, right, bottom in pixels; a box of one pixel at the origin is 0, 0, 1, 1.
        labels: class numbers.
        crowd: True for a region of many objects (COCO's `iscrowd`): not trained on, ignored in evaluation.
        area: in pixels, as COCO's size bands take it: that of the mask where there is one.
        segmentations: for each object its mask as COCO writes it; None where the set has boxes only.
    """

    size: tuple[int, int]
    boxes: Float32[np.ndarray, "objects 4"]
    labels: Int64[np.ndarray, " objects"]
    crowd: Bool[np.ndarray, " objects"]
    area: Float32[np.ndarray, " objects"]
    segmentations: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Bool[np.ndarray, " objects"]) -> Instances:
        """Those objects for which `chosen` is True."""
        kept = np.flatnonzero(chosen).tolist()
        segmentations = None if self.segmentations is None else [self.segmentations[index] for index in kept]
        return Instances(
            self.size, self.boxes[kept], self.labels[kept], self.crowd[kept], self.area[kept], segmentations
        )

    @functools.cached_property
    def masks(self) -> list[RLE] | None:
        """Run-length encoded masks, or None where the set has none. Raises BadAnnotation for one that is damaged."""
        if self.segmentations is None:
            return None
        return [encode_mask(segmentation, self.size) for segmentation in self.segmentations]

    def decode(self) -> UInt8[np.ndarray, "objects height width"]:
        """Masks of 0 and 1. Raises BadAnnotation for a damaged mask, and where the set has none."""
        from pycocotools import mask

        masks = self.masks
        if masks is None:
            raise BadAnnotation("the objects have boxes only, no masks")
        if not masks:
            return np.zeros((0, *self.size), dtype=np.uint8)
        return mask.decode(masks).transpose(2, 0, 1)


def no_instances(size: tuple[int, int], masks: bool) -> Instances:
    """The annotation of a picture without objects."""
    return Instances(
        size,
        np.zeros((0, 4), dtype=np.float32),
        np.zeros(0, dtype=np.int64),
        np.zeros(0, dtype=bool),
        np.zeros(0, dtype=np.float32),
        [] if masks else None,
    )


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> Any:
    """Look at a mask without decoding it.

    Returns:
        the same mask in less memory: polygons as arrays, run lengths as they are.

    Raises:
        BadAnnotation: neither polygons nor run lengths, no area, or a mask of another size than the picture.
    """
    if isinstance(segmentation, dict):
        stated, counts = segmentation.get("size"), segmentation.get("counts")
        if not isinstance(stated, list | tuple) or tuple(stated) != size:
            raise BadAnnotation(f"its mask is of size {stated}, the picture of {list(size)} (height, width)")
        if isinstance(counts, list):
            if not all(isinstance(count, int) and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
                raise BadAnnotation(_WRONG_SUM)
        elif not isinstance(counts, str | bytes) or not counts:
            raise BadAnnotation(f"the run lengths of its mask are {type(counts).__name__}, takes a list or text")
        return segmentation
    if not isinstance(segmentation, list) or not segmentation:
        raise BadAnnotation(
            "its mask is empty" if segmentation == [] else "its mask is neither polygons nor run lengths"
        )
    return [_polygon(polygon, size) for polygon in segmentation]


def _polygon(polygon: Any, size: tuple[int, int]) -> np.ndarray:
    if not isinstance(polygon, list | np.ndarray) or len(polygon) < 6 or len(polygon) % 2:
        raise BadAnnotation("a polygon of its mask is no list of at least three pairs of coordinates")
    try:
        corners = np.asarray(polygon, dtype=np.float64)
        pairs = corners.reshape(-1, 2)
    except (TypeError, ValueError):
        raise BadAnnotation("a polygon of its mask has coordinates that are no numbers") from None
    height, width = size  # the codec walks along the outline, so far away is also slow; NaN compares false
    reach = abs(pairs - (width / 2, height / 2)).max(0)
    if not (reach[0] <= 2 * width and reach[1] <= 2 * height):
        raise BadAnnotation("a polygon of its mask lies far outside the picture")
    return corners


def encode_mask(segmentation: Any, size: tuple[int, int]) -> RLE:
    """One of COCO's ways to write a mask, as run lengths. Raises BadAnnotation as `check_segmentation` does."""
    from pycocotools import mask

    segmentation = check_segmentation(segmentation, size)
    if not isinstance(segmentation, dict):
        return mask.merge(mask.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask.frPyObjects(segmentation, *size)
    counts = segmentation["counts"]
    counts = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    if _pixels(counts) != size[0] * size[1]:  # pycocotools would return uninitialised memory
        raise BadAnnotation(_WRONG_SUM)
    return {"size": list(size), "counts": counts}


_WRONG_SUM = "the run lengths of its mask do not add up to the pixels of the picture"


def _pixels(counts: bytes) -> int:
    """How many pixels compressed run lengths cover; -1 for text that is none.

    Each number is written in groups of 5 bits, the lowest first, of characters from "0"; the sixth bit says that
    another group follows, the highest bit of the last group is the sign. From the fourth number on, what is written is
    the difference to the number two before.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return -1
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    position = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if position.max() > 10:
        return -1
    values = np.add.reduceat((codes & 31) << (5 * position), starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << (5 * (ends - starts + 1)), 0)
    runs = values.copy()
    for parity in (1, 2):  # numbers 1, 3, 5, ... and 2, 4, 6, ...: the first of each stands as it is
        runs[parity::2] = np.cumsum(values[parity::2])
    return int(runs.sum()) if (runs >= 0).all() else -1
