"""A network for semantic segmentation: backbone, a decoder of segmentation_models_pytorch, a 1x1 classifier.

    upernet   UPerNet, arXiv 1807.10221: pooling pyramid on the coarsest map, top-down feature pyramid, all levels fused
    fpn       "Semantic FPN", Panoptic Feature Pyramid Networks, arXiv 1901.02446: pyramid levels upsampled and added

The decoders give scores at the finest map's stride; they are enlarged to the image bilinearly. The auxiliary head, a
3x3 convolution on the third map, only helps training (Pyramid Scene Parsing Network, arXiv 1612.01105, section 3.2).
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.models.backbone import Backbone
from coterie.tasks._dense import group_norm, group_normalised

DECODERS = ("upernet", "fpn")
MULTIPLE = 64  # segmentation_models_pytorch's FPN decoder needs 32 channels at least, and has half of what it gets
DROPOUT = 0.1


class Segmenter(nn.Module):
    """Backbone, decoder and classifier.

    Args:
        backbone: gives the maps.
        classes: number of classes.
        decoder: one of `DECODERS`.
        channels: width of the decoder, a multiple of `MULTIPLE`.
        auxiliary: whether to have the auxiliary head.

    Shape: image (batch, channels, height, width) of any size -> logits (batch, classes, height, width).
    """

    def __init__(self, backbone: Backbone, classes: int, *, decoder: str, channels: int, auxiliary: bool) -> None:
        super().__init__()
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

        self.backbone = backbone
        if decoder == "upernet":
            width = channels
            self.decoder = UPerNetDecoder([0, 0, *backbone.channels], decoder_channels=width)
        else:
            width = channels // 2
            self.decoder = FPNDecoder(backbone.channels, pyramid_channels=channels, segmentation_channels=width)
            self.decoder.dropout = nn.Identity()
        initialize_decoder(self.decoder)
        group_normalised(self.decoder)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(width, classes, 1)
        self.auxiliary: nn.Module | None = None
        if auxiliary:
            self.auxiliary = nn.Sequential(
                nn.Conv2d(backbone.channels[2], channels, 3, padding=1, bias=False),
                group_norm(channels),
                nn.ReLU(),
                nn.Dropout2d(DROPOUT),
                nn.Conv2d(channels, classes, 1),
            )

    def forward(
        self,
        image: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> Float[Tensor, "batch classes height width"] | list[Float[Tensor, "batch classes height width"]]:
        """Logits for every pixel; `mask` is True at real pixels. In training a list: after them the auxiliary ones."""
        maps = self.backbone(image, mask)
        logits = _enlarge(self._decode(maps), image)
        if not self.training:
            return logits
        return [logits] if self.auxiliary is None else [logits, _enlarge(self.auxiliary(maps[2]), image)]

    def _decode(self, maps: list[Tensor]) -> Tensor:
        """Scores at the finest map's stride. The decoders double sizes, so the maps are filled up to fit: cut after."""
        rows, columns = maps[0].shape[2:]
        coarse_rows, coarse_columns = maps[-1].shape[2:]
        fitted = []
        for level, x in enumerate(reversed(maps)):
            missing = (coarse_columns << level) - x.shape[3], (coarse_rows << level) - x.shape[2]
            fitted.append(F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x)
        fitted.reverse()
        y = self.decoder([*fitted[:1], *fitted[:1], *fitted])
        return self.classifier(self.dropout(y))[:, :, :rows, :columns]


def _enlarge(scores: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(scores, image.shape[2:], mode="bilinear", align_corners=False)
