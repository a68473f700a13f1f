"""COCO's mean average precision from torchmetrics, for boxes and run-length encoded masks."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

RLE = dict[str, Any]
FIGURES = {
    "ap": "map", "ap50": "map_50", "ap75": "map_75",
    "ap_small": "map_small", "ap_medium": "map_medium", "ap_large": "map_large",
}  # fmt: skip


class CocoMetrics(MeanAveragePrecision):
    """Average precision of detections whose masks are run-length encoded already.

    Args:
        masks: judge masks too.
    """

    def __init__(self, masks: bool) -> None:
        backend: Any = "faster_coco_eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
        kinds: Any = ("bbox", "segm") if masks else ("bbox",)
        super().__init__(iou_type=kinds, extended_summary=True, backend=backend)
        self.warn_on_many_detections = False

    def update(self, detections: Sequence[Mapping[str, Any]], truths: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            detections: for each image `boxes` (n, 4) left, top, right, bottom; `scores`, `labels` (n,); with masks
                `rle`, n dictionaries with `size` and `counts`.
            truths: `boxes`, `labels`, `crowd`, `area`, and with masks `masks`, the run lengths; in the same pixels.
        """
        for found, true in zip(detections, truths, strict=True):
            self.detection_box.append(box_convert(found["boxes"].cpu().float().reshape(-1, 4), "xyxy", "xywh"))
            self.detection_scores.append(found["scores"].cpu())
            self.detection_labels.append(found["labels"].cpu())
            self.groundtruth_box.append(box_convert(true["boxes"].cpu().float().reshape(-1, 4), "xyxy", "xywh"))
            self.groundtruth_labels.append(true["labels"].cpu())
            self.groundtruth_crowds.append(true["crowd"].cpu().long())
            self.groundtruth_area.append(true["area"].cpu())
            if "segm" in self.iou_type:
                self.detection_mask.append(_as_tuples(found["rle"]))
                self.groundtruth_mask.append(_as_tuples(true["masks"]))

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        """All ranks' images, rank after rank: torchmetrics' own way needs as many images on every rank."""
        parts: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(parts, {name: getattr(self, name) for name in self._reductions}, group=process_group)
        for name in self._reductions:
            setattr(self, name, [entry for part in parts for entry in part[name]])


def figures(computed: Mapping[str, Tensor], kind: str, masks: bool) -> dict[str, float]:
    """AP, AP50, AP75 and AP by size, from 0 to 1, of "bbox" or "segm"; what has no object in the truth is left out."""
    prefix = f"{kind}_" if masks else ""
    values = {name: float(computed[prefix + theirs]) for name, theirs in FIGURES.items()}
    return {name: value for name, value in values.items() if value >= 0}


def class_precision(computed: Mapping[str, Tensor], kind: str, masks: bool) -> dict[int, float]:
    """AP of each class that the truth holds, by its number."""
    precision = computed[f"{kind}_precision" if masks else "precision"]  # IoU, recall, class, size, detections
    result = {}
    for place, label in enumerate(computed["classes"].reshape(-1).tolist()):
        values = precision[:, :, place, 0, -1]
        if bool((values > -1).any()):
            result[label] = float(values[values > -1].mean())
    return result


def encode(masks: Bool[Tensor, "n height width"]) -> list[RLE]:
    """Masks as COCO's run lengths."""
    from pycocotools import mask as codec

    if not len(masks):
        return []
    return codec.encode(np.asfortranarray(masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0)))


def decode(rle: Sequence[RLE], height: int, width: int) -> Bool[np.ndarray, "n height width"]:
    """The inverse of `encode`, for masks of one size."""
    from pycocotools import mask as codec

    if not rle:
        return np.zeros((0, height, width), dtype=bool)
    return codec.decode(list(rle)).transpose(2, 0, 1).astype(bool)


def scale_boxes(boxes: Float[Tensor, "n 4"], size: Sequence[int], original: Sequence[int]) -> Float[Tensor, "n 4"]:
    """Boxes in the pixels of an image of (h, w) `size`, in those of `original`."""
    factor = boxes.new_tensor([original[1] / size[1], original[0] / size[0]]).repeat(2)
    limit = boxes.new_tensor([original[1], original[0]]).repeat(2)
    return torch.minimum((boxes * factor).clamp_min(0), limit)


def _as_tuples(masks: Sequence[RLE]) -> Any:
    return tuple((tuple(mask["size"]), mask["counts"]) for mask in masks)
