"""Box heads in three stages, each trained on and applied to the boxes of the one before.

Cascade R-CNN, Cai and Vasconcelos, arXiv 1906.09756, on the pieces of torchvision's RoIHeads. A detector trained with a
low IoU threshold gives noisy boxes, one trained with a high threshold sees too few proposals; in a cascade the boxes
get better from stage to stage, and so can the thresholds.

    stage     IoU of a positive    weights of the offsets (x, y, w, h)    weight of the loss
      1              0.5                 10, 10, 5, 5                           1
      2              0.6                 20, 20, 10, 10                         0.5
      3              0.7                 30, 30, 15, 15                         0.25

Offsets are class-agnostic: one box per proposal, not one per class, as in the paper, so that the next stage gets one
box. In evaluation the boxes are those of the last stage, and the scores the mean over the stages, each on its own
input. Proposals are sampled once, before the first stage. The mask head is one, trained on the positives of the first
stage (the paper's strategy (b)) and applied to the final boxes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import boxes as box_ops

THRESHOLDS = (0.5, 0.6, 0.7)
OFFSET_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
BETA = 1 / 9  # of the smooth L1 loss, as in torchvision


class StagePredictor(nn.Module):
    """Class scores and class-agnostic box offsets.

    Shape: (boxes, features) -> (boxes, classes) with the background as class 0, and (boxes, 4).
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(features, classes)
        self.bbox_pred = nn.Linear(features, 4)

    def forward(self, x: Float[Tensor, "boxes features"]) -> tuple[Tensor, Tensor]:
        """Scores (logits) and offsets, in float32."""
        return self.cls_score(x).float(), self.bbox_pred(x).float()


class CascadeRoIHeads(RoIHeads):
    """torchvision's RoIHeads with three box stages.

    Args:
        features: of a pooled box, flattened.
        hidden: width of the box heads.
        classes: with the background.
        **common: as RoIHeads takes them.
    """

    def __init__(self, features: int, hidden: int, classes: int, **common: Any) -> None:
        super().__init__(box_head=nn.Identity(), box_predictor=nn.Identity(), **common)
        self.box_heads = nn.ModuleList(TwoMLPHead(features, hidden) for _ in THRESHOLDS)
        self.box_predictors = nn.ModuleList(StagePredictor(hidden, classes) for _ in THRESHOLDS)
        self.coders = [BoxCoder(weights) for weights in OFFSET_WEIGHTS]
        self.matchers = [Matcher(iou, iou, allow_low_quality_matches=False) for iou in THRESHOLDS]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections (none in training) and losses (none in evaluation); arguments as RoIHeads takes them."""
        if self.training:
            assert targets is not None
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _stage(
        self, stage: int, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Scores and offsets of a stage for boxes, and the boxes that it makes of them."""
        pooled = self.box_heads[stage](self.box_roi_pool(features, boxes, image_shapes))
        scores, offsets = self.box_predictors[stage](pooled)
        counts = [len(one) for one in boxes]
        decoded = self.coders[stage].decode(offsets.detach(), boxes).reshape(-1, 4).split(counts)
        return (
            scores,
            offsets,
            [box_ops.clip_boxes_to_image(one, shape) for one, shape in zip(decoded, image_shapes, strict=True)],
        )

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        true_boxes = [target["boxes"] for target in targets]
        true_labels = [target["labels"] for target in targets]
        boxes, matched, labels, _ = self.select_training_samples(proposals, targets)
        losses: dict[str, Tensor] = {}
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, boxes, matched, labels, image_shapes, targets)
        for stage, weight in enumerate(LOSS_WEIGHTS):
            if stage:
                self.proposal_matcher = self.matchers[stage]
                matched, labels = self.assign_targets_to_proposals(boxes, true_boxes, true_labels)
            scores, offsets, refined = self._stage(stage, features, boxes, image_shapes)
            score_loss, box_loss = self._box_losses(stage, scores, offsets, boxes, matched, labels, true_boxes)
            losses[f"loss_classifier_{stage + 1}"] = weight * score_loss
            losses[f"loss_box_reg_{stage + 1}"] = weight * box_loss
            boxes = refined
        self.proposal_matcher = self.matchers[0]
        return losses

    def _box_losses(
        self,
        stage: int,
        scores: Float[Tensor, "boxes classes"],
        offsets: Float[Tensor, "boxes 4"],
        boxes: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        true_boxes: list[Tensor],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        positive = [label > 0 for label in labels]
        sources = [one[keep] for one, keep in zip(boxes, positive, strict=True)]
        goals = [true[index[keep]] for true, index, keep in zip(true_boxes, matched, positive, strict=True)]
        wanted = torch.cat(self.coders[stage].encode(goals, sources))
        every = torch.cat(labels)
        box_loss = F.smooth_l1_loss(offsets[every > 0], wanted, beta=BETA, reduction="sum") / max(1, len(every))
        score_loss = F.cross_entropy(scores, every, reduction="sum") / max(1, len(every))
        return score_loss, box_loss

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> Float[Tensor, ""]:
        positive = [label > 0 for label in labels]
        sources = [one[keep] for one, keep in zip(boxes, positive, strict=True)]
        index = [one[keep] for one, keep in zip(matched, positive, strict=True)]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, sources, image_shapes))).float()
        return maskrcnn_loss(
            logits, sources, [target["masks"] for target in targets], [target["labels"] for target in targets], index
        )

    def _detect(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        counts = [len(one) for one in boxes]
        mean: Any = 0.0
        for stage in range(len(THRESHOLDS)):
            scores, _, boxes = self._stage(stage, features, boxes, image_shapes)
            mean = mean + scores.softmax(-1) / len(THRESHOLDS)
        detections = [
            self._select(one, probabilities) for one, probabilities in zip(boxes, mean.split(counts), strict=True)
        ]
        if self.has_mask():
            pooled = self.mask_roi_pool(features, [one["boxes"] for one in detections], image_shapes)
            logits = self.mask_predictor(self.mask_head(pooled)).float()
            for detection, masks in zip(
                detections, maskrcnn_inference(logits, [one["labels"] for one in detections]), strict=True
            ):
                detection["masks"] = masks
        return detections

    def _select(
        self, boxes: Float[Tensor, "boxes 4"], probabilities: Float[Tensor, "boxes classes"]
    ) -> dict[str, Tensor]:
        """Each box with each class of a good enough score, after NMS by class; the best first."""
        row, column = torch.where(probabilities[:, 1:] > self.score_thresh)
        boxes, scores, labels = boxes[row], probabilities[row, column + 1], column + 1
        keep = box_ops.remove_small_boxes(boxes, min_size=1e-2)
        boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
        keep = box_ops.batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
