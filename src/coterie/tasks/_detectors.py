"""Detectors: backbone, feature pyramid, and the heads of torchvision.

    maps of strides s, 2s, 4s, 8s -> pyramid (arXiv 1612.03144) of these and 16s, all with one width -> heads

    retinanet      focal loss on anchors, arXiv 1708.02002
    fcos           no anchors: distances to the sides, arXiv 1904.01355
    faster_rcnn    proposals, then boxes, arXiv 1506.01497
    mask_rcnn      and masks, arXiv 1703.06870
    cascade_mask_rcnn   boxes in three stages (`_cascade.py`), arXiv 1906.09756

What is ours: torchvision's transforms are left out, because the data are resized and normalised already; anchors have
the pyramid's true strides (torchvision divides sizes, which is wrong for maps of ceil(size / stride)); group
normalisation in pyramid and heads, so that training from scratch and batches of one image are stable, and with it the
heads' convolutions from a Kaiming normal (at torchvision's 0.01, in front of a normalisation, Adam's steps are large
beside the weights: 30 steps with lr 2e-3 on three images then left a loss of 0.55, with this 0.14). NMS runs where
the tensors are.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOS, FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from coterie.models.backbone import Backbone
from coterie.tasks._cascade import CascadeRoIHeads
from coterie.tasks._dense import group_norm, group_normalised

ONE_STAGE = ("retinanet", "fcos")
TWO_STAGE = ("faster_rcnn", "mask_rcnn", "cascade_mask_rcnn")
OCTAVES = 3  # anchor sizes per level of RetinaNet
Sizes = list[tuple[int, int]]
Targets = list[dict[str, Tensor]]
Detections = list[dict[str, Tensor]]


class Anchors(AnchorGenerator):
    """torchvision's anchors at given strides, always in float32.

    Args:
        strides: of the pyramid's levels.
        scales: anchor sizes as multiples of the stride.
        ratios: height over width.
    """

    def __init__(self, strides: list[int], scales: list[float], ratios: list[float]) -> None:
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(ratios),) * len(strides))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of each image (anchors, 4), level after level."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        steps = [[torch.tensor(s, device=feature_maps[0].device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], steps))
        return [anchors for _ in image_list.image_sizes]


class Pyramid(nn.Module):
    """Five levels of one width from four maps: the last is every second position of the fourth."""

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__()
        self.fpn = FeaturePyramidNetwork(backbone.channels, channels, LastLevelMaxPool(), norm_layer=group_norm)
        self.strides = [*backbone.strides, 2 * backbone.strides[-1]]

    def forward(self, maps: list[Float[Tensor, "batch dim rows columns"]]) -> OrderedDict[str, Tensor]:
        """Levels "0" to "3" and "pool", the finest first, in float32."""
        levels = self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))
        return OrderedDict((name, x.float()) for name, x in levels.items())


class _FloatRPNHead(RPNHead):
    """Objectness and offsets in float32, whatever autocast makes of the convolutions."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, offsets = super().forward(x)
        return [one.float() for one in objectness], [one.float() for one in offsets]


class OneStageDetector(nn.Module):
    """RetinaNet or FCOS.

    `forward(image, mask, sizes, targets)`: in training the losses; in evaluation for each image boxes (n, 4) in pixels
    of the batch's images, scores (n,) and labels (n,), the best first. Labels count from 0.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        detector: str,
        channels: int,
        anchor_scale: float | None,
        **limits: Any,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = Pyramid(backbone, channels)
        nowhere = nn.Identity()
        nowhere.out_channels = channels  # type: ignore[assignment]
        if detector == "retinanet":
            scales = [(anchor_scale or 4.0) * 2 ** (octave / OCTAVES) for octave in range(OCTAVES)]
            anchors = Anchors(self.pyramid.strides, scales, [0.5, 1.0, 2.0])
            head = RetinaNetHead(channels, 3 * OCTAVES, classes, norm_layer=group_norm)
            self.core: Any = RetinaNet(nowhere, classes, anchor_generator=anchors, head=head, **limits)
        else:
            anchors = Anchors(self.pyramid.strides, [anchor_scale or 1.0], [1.0])
            head = group_normalised(FCOSHead(channels, 1, classes))
            self.core = FCOS(nowhere, classes, anchor_generator=anchors, head=head, **limits)
        for tower in (head.classification_head.conv, head.regression_head.conv):
            for module in tower.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(
        self,
        image: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None,
        sizes: Sizes,
        targets: Targets | None = None,
    ) -> dict[str, Tensor] | Detections:
        """Losses or detections; see the class."""
        levels = list(self.pyramid(self.backbone(image, mask)).values())
        outputs = {name: value.float() for name, value in self.core.head(levels).items()}
        anchors = self.core.anchor_generator(ImageList(image, sizes), levels)
        per_place = self.core.anchor_generator.num_anchors_per_location()[0]
        counts = [x.shape[2] * x.shape[3] * per_place for x in levels]
        if self.training:
            assert targets is not None
            more = (counts,) if isinstance(self.core, FCOS) else ()
            return self.core.compute_loss(targets, outputs, anchors, *more)
        split = {name: list(value.split(counts, 1)) for name, value in outputs.items()}
        return self.core.postprocess_detections(split, [list(one.split(counts)) for one in anchors], sizes)


class TwoStageDetector(nn.Module):
    """Faster, Mask or Cascade Mask R-CNN; called as `OneStageDetector`. Targets' and detections' labels count from 0.

    With masks, detections have `masks` (n, 1, 28, 28): probabilities inside each box.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        detector: str,
        channels: int,
        anchor_scale: float | None,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
        roi_samples: int,
        proposals: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid = Pyramid(backbone, channels)
        anchors = Anchors(self.pyramid.strides, [anchor_scale or 8.0], [0.5, 1.0, 2.0])
        self.rpn = RegionProposalNetwork(
            anchors,
            _FloatRPNHead(channels, 3),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        hidden = 4 * channels
        common = {
            "box_roi_pool": roi_align(backbone.strides, 7),
            "fg_iou_thresh": 0.5,
            "bg_iou_thresh": 0.5,
            "batch_size_per_image": roi_samples,
            "positive_fraction": 0.25,
            "bbox_reg_weights": None,
            "score_thresh": score_thresh,
            "nms_thresh": nms_thresh,
            "detections_per_img": detections_per_img,
        }
        if detector == "cascade_mask_rcnn":
            self.roi_heads: RoIHeads = CascadeRoIHeads(channels * 7**2, hidden, classes + 1, **common)
        else:
            head, predictor = TwoMLPHead(channels * 7**2, hidden), FastRCNNPredictor(hidden, classes + 1)
            self.roi_heads = RoIHeads(box_head=head, box_predictor=predictor, **common)
        if detector != "faster_rcnn":
            self.roi_heads.mask_roi_pool = roi_align(backbone.strides, 14)
            self.roi_heads.mask_head = MaskRCNNHeads(channels, (channels,) * 4, 1, norm_layer=group_norm)
            self.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, classes + 1)

    def forward(
        self,
        image: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None,
        sizes: Sizes,
        targets: Targets | None = None,
    ) -> dict[str, Tensor] | Detections:
        """Losses or detections; see the class."""
        levels = self.pyramid(self.backbone(image, mask))
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]  # 0 is the background there
        proposals, rpn_losses = self.rpn(ImageList(image, sizes), levels, targets)
        detections, losses = self.roi_heads(levels, proposals, sizes, targets)
        if self.training:
            return {**rpn_losses, **losses}
        return [{**detection, "labels": detection["labels"] - 1} for detection in detections]


def roi_align(strides: list[int], size: int) -> MultiScaleRoIAlign:
    """Pooling of boxes to size x size from the four levels; told the strides, which torchvision would guess."""
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    low, high = (strides[0].bit_length() - 1, strides[-1].bit_length() - 1)
    pool.map_levels = initLevelMapper(low, high)
    return pool


def build_detector(backbone: Backbone, classes: int, *, detector: str, **options: Any) -> nn.Module:
    """A detector by name; options as its class takes them."""
    kind = OneStageDetector if detector in ONE_STAGE else TwoStageDetector
    return kind(backbone, classes, detector=detector, **options)
