"""COCO's evaluation of a run's detections: precision over recall, average precision by class, and what matched what.

The reference implementation, pycocotools, does the counting: detections in the order of their scores take, in each
image and class, the true object they overlap most; the crowd takes any number and counts nothing. At most 100
detections an image count. T.-Y. Lin et al., "Microsoft COCO", ECCV 2014; cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from coterie.data import BadSample, Instances
from coterie.inspect.runs import Detections

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


@dataclass
class ImageMatch:
    """Detections and objects of one image, matched at an IoU of 0.5; crowds are left out.

    `boxes`, `scores`, `labels` and `right` (whether it matched) have a row for each detection, the surest first;
    `true_labels` and `found_at`, the score of the detection that found it (-1 for none), a row for each object.
    """

    index: int
    boxes: Float[np.ndarray, "boxes 4"]
    scores: Float[np.ndarray, " boxes"]
    labels: Int[np.ndarray, " boxes"]
    right: Bool[np.ndarray, " boxes"]
    true_labels: Int[np.ndarray, " objects"]
    found_at: Float[np.ndarray, " objects"]

    def errors(self, least: float) -> tuple[int, int]:
        """Objects missed and detections wrong, of detections with a score of at least `least`."""
        return int((self.found_at < least).sum()), int((~self.right & (self.scores >= least)).sum())


@dataclass
class CocoFigures:
    """What COCO's evaluation gives.

    Attributes:
        precision: By IoU threshold (0.50 to 0.95), recall (0 to 1 in hundredths) and class; NaN for a class without
            objects.
        objects: Of each class, crowds left out.
        images: What matched what in each image that was looked at.
    """

    precision: Float[np.ndarray, "thresholds recalls classes"]
    objects: Int[np.ndarray, " classes"]
    images: list[ImageMatch]

    def average(self, threshold: int | None = None) -> Float[np.ndarray, " classes"]:
        """AP of each class: the mean over recalls, and over IoU thresholds where none is chosen (0: 0.50, 5: 0.75)."""
        chosen = self.precision if threshold is None else self.precision[threshold : threshold + 1]
        return chosen.mean(axis=(0, 1))

    def best_threshold(self) -> tuple[float, float, float, float]:
        """The score at which F1 over all images and classes is highest, with precision, recall and F1 there."""
        scores = np.concatenate([match.scores for match in self.images] or [np.zeros(0)])
        right = np.concatenate([match.right for match in self.images] or [np.zeros(0, dtype=bool)])
        if not len(scores) or not self.objects.sum():
            return 0.5, 0.0, 0.0, 0.0
        order = np.argsort(-scores, kind="stable")
        hits = np.cumsum(right[order])
        precision, recall = hits / np.arange(1, len(hits) + 1), hits / self.objects.sum()
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1.argmax())
        return float(scores[order[best]]), float(precision[best]), float(recall[best]), float(f1[best])


def evaluate_detections(
    found: Detections, dataset: Any, classes: Sequence[str], *, masks: bool = False, skip: Sequence[str] = ()
) -> CocoFigures:
    """Compare detections with a dataset of instances.

    Args:
        found: Detections of all its images.
        dataset: The split; `target(index)` gives an image's Instances.
        classes: Names of the classes.
        masks: Overlap of masks instead of boxes.
        skip: Names of images that the evaluation left out.

    Raises:
        ValueError: detections of images that the dataset does not have.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(found.indices) and not 0 <= found.indices.min() <= found.indices.max() < len(dataset):
        raise ValueError(f"the predictions are of image {found.indices.max()}, the data has {len(dataset)} images")
    truths = _truths(dataset, set(skip))
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how long everything took
        truth, answers = COCO(), COCO()
        categories = [{"id": label, "name": name} for label, name in enumerate(classes)]
        images = [{"id": index, "width": target.size[1], "height": target.size[0]} for index, target in truths.items()]
        truth.dataset = {"images": images, "categories": categories, "annotations": _true_entries(truths, masks)}
        answers.dataset = {
            "images": images, "categories": categories, "annotations": _found_entries(found, truths, masks),
        }  # fmt: skip
        truth.createIndex()
        answers.createIndex()
        judge = COCOeval(truth, answers, "segm" if masks else "bbox")
        judge.params.areaRng, judge.params.areaRngLbl = [[0, 1e10]], ["all"]
        judge.params.maxDets = [100]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][:, :, :, 0, 0]
    objects = np.zeros(len(classes), dtype=np.int64)
    for target in truths.values():
        objects += np.bincount(target.labels[~target.crowd], minlength=len(classes))
    return CocoFigures(np.where(precision < 0, np.nan, precision), objects, _matches(judge, found, truths))


def _truths(dataset: Any, skip: set[str]) -> dict[int, Instances]:
    truths = {}
    for index in range(len(dataset)):
        if dataset.name(index) in skip:
            continue
        with contextlib.suppress(BadSample):  # the evaluation left it out as well, and the log says so
            truths[index] = dataset.target(index)
    return truths


def _true_entries(truths: dict[int, Instances], masks: bool) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for index, target in truths.items():
        shapes = target.masks if masks else None
        for row in range(len(target)):
            mask = {"segmentation": shapes[row]} if shapes is not None else {}
            entries.append(
                {"id": len(entries) + 1, "image_id": index, "category_id": int(target.labels[row]),
                 "bbox": _corner_and_size(target.boxes[row]), "area": float(target.area[row]),
                 "iscrowd": int(target.crowd[row]), **mask}
            )  # fmt: skip
    return entries


def _found_entries(found: Detections, truths: dict[int, Instances], masks: bool) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for row, index in enumerate(found.indices.tolist()):
        if index not in truths:
            continue
        box = _corner_and_size(found.boxes[row])
        mask = {}
        if masks:
            assert found.masks is not None
            assert found.sizes is not None
            mask = {"segmentation": {"size": found.sizes[row].tolist(), "counts": bytes(found.masks[row])}}
        entries.append(
            {"id": row + 1, "image_id": index, "category_id": int(found.labels[row]), "bbox": box,
             "area": box[2] * box[3], "iscrowd": 0, "score": float(found.scores[row]), **mask}
        )  # fmt: skip
    return entries


def _corner_and_size(box: np.ndarray) -> list[float]:
    left, top, right, bottom = map(float, box)
    return [left, top, right - left, bottom - top]


def _matches(judge: Any, found: Detections, truths: dict[int, Instances]) -> list[ImageMatch]:
    """What pycocotools matched at an IoU of 0.5, image by image, all classes together."""
    hits: dict[int, set[int]] = {index: set() for index in truths}
    found_by: dict[int, dict[int, int]] = {index: {} for index in truths}
    ignored: set[int] = set()
    for entry in judge.evalImgs:
        if entry is None:
            continue
        for number, match, ignore in zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True):
            if ignore:
                ignored.add(int(number))
            elif match:
                hits[entry["image_id"]].add(int(number))
                found_by[entry["image_id"]][int(match)] = int(number)
    order = np.lexsort((-found.scores, found.indices))
    result, first = [], 1
    for index, target in truths.items():
        begin, end = np.searchsorted(found.indices[order], [index, index + 1])
        rows = [row for row in order[begin:end].tolist() if row + 1 not in ignored]
        numbers = np.arange(first, first + len(target))
        first += len(target)
        by = found_by[index]
        at = np.array([found.scores[by[n] - 1] if n in by else -1.0 for n in numbers.tolist()], dtype=np.float32)
        result.append(
            ImageMatch(
                index,
                found.boxes[rows],
                found.scores[rows],
                found.labels[rows],
                np.array([row + 1 in hits[index] for row in rows], dtype=bool),
                target.labels[~target.crowd],
                at[~target.crowd],
            )
        )
    return result
