"""Boxes, and boxes with masks: torchvision's detectors in training, COCO's average precision in evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.tasks import Batch, PictureTask
from coterie.tasks._dense import build_backbone, class_colors, with_legend, without_padding

if TYPE_CHECKING:
    from PIL import Image

PASTED_AT_ONCE = 16
WORST_SHOWN = 3
Detection = dict[str, Any]


class ObjectDetection(PictureTask):
    """Find the objects of `classes` in an image.

    A training batch holds `image` (batch, channels, height, width), `mask` (batch, height, width) bool where images are
    padded, `size` (batch, 2), and `instances`: for each image `boxes` (n, 4) in pixels of the padded image and `labels`
    (n,). In evaluation `truth` holds for each image boxes, labels, crowd and area at the original resolution, and
    `original_size` (batch, 2) the (h, w) there. The output then is, for each image, `boxes` (n, 4) left, top, right,
    bottom in original pixels, `scores` and `labels` (n,), the best first.

    Args:
        classes: Names of the classes, in the order of the labels.
        augment: not used: images are mixed in classification only.
        detector: one of `detectors`.
        channels: width of pyramid and heads, a multiple of 32.
        anchor_scale: anchors' side over the stride of their level; for FCOS the scale of the range of each level. If
            None 4 for RetinaNet (and octaves of it), 8 for R-CNN, 1 for FCOS.
        roi_samples: boxes per image on which the second stage trains.
        proposals: boxes per image that the first stage hands over, at most.
        score_threshold: detections with a lower score are dropped.
        nms_threshold: IoU above which of two boxes of a class the worse is dropped.
        max_detections: per image.
        frozen_batch_norm: batch normalisations of the backbone stay as they are.
    """

    summary = "ap"
    target: ClassVar[str] = "instances"
    masks: ClassVar[bool] = False
    detectors: ClassVar[tuple[str, ...]] = ("retinanet", "fcos", "faster_rcnn")
    defaults: ClassVar[dict[str, Any]] = {
        "data.source": "digit-scenes",
        "schedule.warmup_epochs": 1.0,
        "optim.lr": 5e-4,
        "train.epochs": 50,
        "train.batch_size": 8,
    }

    def __init__(
        self,
        classes: Sequence[str],
        *,
        augment: Mapping[str, Any] | None = None,
        detector: str | None = None,
        channels: int = 128,
        anchor_scale: float | None = None,
        roi_samples: int = 256,
        proposals: int = 1000,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        frozen_batch_norm: bool = False,
    ) -> None:
        self.classes = list(classes)
        self.detector = self.detectors[0] if detector is None else detector
        if self.detector not in self.detectors:
            raise ValueError(f"task.options.detector must be one of {', '.join(self.detectors)}, got {detector!r}")
        if channels < 32 or channels % 32:
            raise ValueError(f"task.options.channels must be a multiple of 32, got {channels}")
        if anchor_scale is not None and anchor_scale <= 0:
            raise ValueError(f"task.options.anchor_scale must be above 0, got {anchor_scale}")
        for name, value in (("score_threshold", score_threshold), ("nms_threshold", nms_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"task.options.{name} must be from 0 to 1, got {value}")
        for name, value in (("roi_samples", roi_samples), ("proposals", proposals), ("max_detections", max_detections)):
            if value < 1:
                raise ValueError(f"task.options.{name} must be at least 1, got {value}")
        self.options: dict[str, Any] = {
            "channels": channels,
            "anchor_scale": anchor_scale,
            "score_thresh": score_threshold,
            "nms_thresh": nms_threshold,
            "detections_per_img": max_detections,
        }
        if self.detector.endswith("rcnn"):
            self.options |= {"roi_samples": roi_samples, "proposals": proposals}
        self.frozen_batch_norm = frozen_batch_norm

    def build_model(self, config: Any, source: Any) -> nn.Module:
        """Backbone `config.name` and the detector, for the channels and classes of `source`."""
        from coterie.tasks._detectors import build_detector

        backbone = build_backbone(config, source, frozen_batch_norm=self.frozen_batch_norm)
        return build_detector(backbone, len(source.classes), detector=self.detector, **self.options)

    def prepare_batch(self, batch: Batch) -> Batch:
        """Nothing."""
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """In training the sum of the detector's losses (`output` has them one by one); in evaluation the detections."""
        if not model.training:
            return {"output": self.predict(model, batch)}
        losses = model(
            batch["image"],
            batch.get("mask"),
            _pairs(batch["size"]),
            [self._target(instances) for instances in batch["instances"]],
        )
        return {"loss": torch.stack([loss.float() for loss in losses.values()]).sum(), "output": losses}

    def _target(self, instances: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What torchvision trains on: no crowds, and no boxes without area, which its losses cannot take."""
        boxes = instances["boxes"].float()
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        if "crowd" in instances:
            keep &= ~instances["crowd"]
        target = {"boxes": boxes[keep], "labels": instances["labels"][keep]}
        if self.masks:
            target["masks"] = instances["masks"][keep]
        return target

    def predict(self, model: nn.Module, batch: Batch) -> list[Detection]:
        """The detections in each image, in original pixels, on the CPU."""
        found: list[dict[str, Tensor]] = []
        for images in without_padding(batch):
            found += model(images, None, [tuple(images.shape[2:])] * len(images))
        sizes, originals = _pairs(batch["size"]), _pairs(batch["original_size"])
        return [self._restore(one, size, original) for one, size, original in zip(found, sizes, originals, strict=True)]

    def _restore(self, found: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int]) -> Detection:
        from coterie.tasks._coco import encode, scale_boxes

        boxes = scale_boxes(found["boxes"].float(), size, original)
        result: Detection = {
            "boxes": boxes.cpu(),
            "scores": found["scores"].float().cpu(),
            "labels": found["labels"].cpu(),
        }
        if self.masks:
            result["rle"] = encode(_paste(found["masks"], boxes, original))
        return result

    def metrics(self) -> Any:
        """COCO's average precision, from torchmetrics."""
        from coterie.tasks._coco import CocoMetrics

        return CocoMetrics(self.masks)

    def update(self, metrics: Any, output: list[Detection], batch: Batch) -> None:
        """Add the detections of one batch."""
        metrics.update(output, batch["truth"])

    def report(self, metrics: Any) -> dict[str, float]:
        """Box AP (mean over IoU 0.50 to 0.95), AP50, AP75, and AP of small, medium and large objects; 0 to 1."""
        from coterie.tasks._coco import figures

        return {"ap": 0.0, **figures(metrics.compute(), "bbox", self.masks)}

    def comment(self, metrics: Any) -> list[str]:
        """Sentences for people: the classes that are found worst."""
        from coterie.tasks._coco import class_precision

        kind, what = ("segm", "mask AP") if self.masks else ("bbox", "AP")
        by_class = class_precision(metrics.compute(), kind, self.masks)
        worst = sorted(by_class, key=lambda label: (by_class[label], label))[:WORST_SHOWN]
        return [f"{self.classes[label]}: {what} {by_class[label]:.3f}" for label in worst]

    def collect(self, output: list[Detection], batch: Batch) -> dict[str, Tensor | np.ndarray]:
        """One row per detection: sample number, box, score, label; with masks their size and COCO's run lengths."""
        counts = torch.tensor([len(one["scores"]) for one in output])
        rows: dict[str, Tensor | np.ndarray] = {
            "indices": batch["index"].cpu().repeat_interleave(counts),
            **{name: torch.cat([one[name] for one in output]) for name in ("boxes", "scores", "labels")},
        }
        if self.masks:
            masks = [mask for one in output for mask in one["rle"]]
            rows["masks"] = np.array([mask["counts"] for mask in masks], dtype=bytes)
            rows["sizes"] = np.array([mask["size"] for mask in masks], dtype=np.int32).reshape(-1, 2)
        return rows

    def answers(self, output: list[Detection], batch: Batch) -> list[dict[str, np.ndarray]]:
        """For each image boxes (n, 4), scores, labels (n,), the best first; with masks `masks` (n, h, w) bool."""
        answers = [{name: one[name].numpy() for name in ("boxes", "scores", "labels")} for one in output]
        if self.masks:
            from coterie.tasks._coco import decode

            for answer, one, (height, width) in zip(answers, output, _pairs(batch["original_size"]), strict=True):
                answer["masks"] = decode(one["rle"], height, width)
        return answers

    def palette(self) -> list[tuple[int, int, int]]:
        """The colour of each class, as `draw` uses it."""
        names = [f"class {number}" for number in range(len(self.classes))]  # an object is never background
        return [tuple(color) for color in class_colors(names).tolist()]

    def draw(self, image: Image.Image, answer: Mapping[str, np.ndarray]) -> Image.Image:
        """The image with every box (and mask) of an answer, and its score if it has one, above a legend of classes."""
        from PIL import Image, ImageDraw, ImageFont

        colors = self.palette()
        labels = [int(label) for label in answer["labels"]]
        picture = image.convert("RGB")
        if "masks" in answer and labels:
            pixels = np.asarray(picture, dtype=np.float32).copy()
            for mask, label in zip(answer["masks"], labels, strict=True):
                inside = np.asarray(mask, dtype=bool)
                pixels[inside] = (pixels[inside] + colors[label]) / 2
            picture = Image.fromarray(pixels.round().astype(np.uint8))
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(11)
        for row in reversed(range(len(labels))):  # the best last, on top
            left, top, right, bottom = answer["boxes"][row].tolist()
            draw.rectangle((left, top, right, bottom), outline=colors[labels[row]], width=2)
            if "scores" in answer:
                draw.text((left + 3, top + 1), f"{answer['scores'][row]:.2f}", fill=colors[labels[row]], font=font)
        amounts = Counter(labels)
        return with_legend(
            picture, [(f"{self.classes[label]} ({amounts[label]})", colors[label]) for label in sorted(amounts)]
        )


class InstanceSegmentation(ObjectDetection):
    """Find the objects of `classes` and the pixels of each.

    As ObjectDetection; instances in training have `masks` (n, height, width) uint8, and the truth `masks`, COCO's run
    lengths. Detections have `rle`, their masks as run lengths in original pixels.
    """

    summary = "mask_ap"
    masks: ClassVar[bool] = True
    detectors: ClassVar[tuple[str, ...]] = ("mask_rcnn", "cascade_mask_rcnn")

    def report(self, metrics: Any) -> dict[str, float]:
        """The figures of ObjectDetection, and the same of masks with `mask_` before the name."""
        from coterie.tasks._coco import figures

        found = figures(metrics.compute(), "segm", True)
        return {**super().report(metrics), "mask_ap": 0.0, **{f"mask_{name}": value for name, value in found.items()}}


def _pairs(sizes: Tensor) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in sizes.tolist()]


def _paste(
    masks: Float[Tensor, "n 1 rows columns"], boxes: Float[Tensor, "n 4"], size: tuple[int, int]
) -> Bool[Tensor, "n height width"]:
    """Masks inside boxes as masks of the image, cut at a probability of 0.5; a few at once to save memory."""
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    result = torch.zeros((len(boxes), *size), dtype=torch.bool)
    for start in range(0, len(boxes), PASTED_AT_ONCE):
        part = slice(start, start + PASTED_AT_ONCE)
        result[part] = (paste_masks_in_image(masks[part].float(), boxes[part], size)[:, 0] >= 0.5).cpu()
    return result
