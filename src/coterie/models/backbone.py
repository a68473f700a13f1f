"""Any vision model as the backbone of a dense task: four feature maps, each with half the rows of the one before.

    image (B, C, H, W), mask (B, H, W) -> four maps (B, C_i, ceil(H / s_i), ceil(W / s_i)), strides s = 4, 8, 16, 32

Pyramids of coterie get the mask and keep padding out of everything. Models of timm, and ours that are timm's ViT with
another attention, know no mask: they see the padding as pixels of the mean colour. A model whose maps all have one
stride (a plain ViT) gets the simple feature pyramid of ViTDet (arXiv 2203.16527, section 3): its last map, enlarged by
transposed convolutions and reduced by pooling.

Each map gets a LayerNorm of its own, as in Swin's dense backbones: a stage's output is a residual stream whose scale
grows with depth, and heads trained from scratch need one that does not.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import LayerNorm2d, freeze_batch_norm_2d
from torch import Tensor, nn

from coterie.models._registry import create_model, list_models

MAPS = 4
# What timm's models call it when they are to take any image size; one that knows none of it takes any size as it is.
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"dynamic_img_size": True},
    {},
)


class Backbone(nn.Module):
    """The four feature maps of a model.

    Args:
        name: model of coterie or timm.
        in_chans: channels of the image.
        norm: normalise each map over its channels.
        frozen_batch_norm: batch normalisations keep their statistics and scales, for pretrained weights and small
            batches.
        **options: as the model takes them (`drop_path_rate`, `attention`, `stem_stride`, `pretrained`, ...).

    Attributes:
        channels: of the four maps, the finest first.
        strides: pixels between two positions of each map.

    Raises:
        ValueError: an unknown model, one without four maps, or an option that it does not take.
    """

    def __init__(
        self, name: str, in_chans: int = 3, *, norm: bool = True, frozen_batch_norm: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.model: Any
        try:
            self.model = _masked_model(name, in_chans=in_chans, **options)
            self.takes_mask = self.model is not None
            if self.takes_mask:
                infos = [(info["num_chs"], info["reduction"]) for info in self.model.feature_info]
                self.model.prune_intermediate_layers(len(infos), prune_norm=True)
            else:
                self.model = _timm_features(name, in_chans=in_chans, **options)
                infos = [(info["num_chs"], info["reduction"]) for info in self.model.feature_info.get_dicts()]
        except TypeError as error:  # a keyword that the constructor does not know
            raise ValueError(f"backbone {name}: {error}") from error
        self.channels_last_maps = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        self.pyramid: nn.Module | None = None
        if len({stride for _, stride in infos}) == 1:
            self.pyramid = SimplePyramid(*infos[-1])
            infos = list(zip(self.pyramid.channels, self.pyramid.strides))
        infos = infos[-MAPS:]
        if len(infos) < MAPS or any(2 * fine[1] != coarse[1] for fine, coarse in itertools.pairwise(infos)):
            strides = ", ".join(str(stride) for _, stride in infos)
            raise ValueError(f"backbone must have four maps of strides s, 2s, 4s, 8s; {name} has {strides}")
        self.channels = [channels for channels, _ in infos]
        self.strides = [stride for _, stride in infos]
        if frozen_batch_norm:
            self.model = freeze_batch_norm_2d(self.model)
        self.norms = nn.ModuleList(LayerNorm2d(c) if norm else nn.Identity() for c in self.channels)

    def forward(
        self,
        image: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> list[Float[Tensor, "batch dim rows columns"]]:
        """The maps, the finest first; with a mask (True = a real pixel) they are zero where the image is padding."""
        if self.takes_mask:
            maps = self.model.forward_intermediates(image, indices=MAPS, intermediates_only=True, mask=mask)
        else:
            maps = self._timm_maps(image)
        maps = [norm(x) for norm, x in zip(self.norms, maps, strict=True)]
        if mask is None:
            return maps
        return [x.masked_fill(~mask[:, None, ::s, ::s], 0.0) for x, s in zip(maps, self.strides, strict=True)]

    def _timm_maps(self, image: Tensor) -> list[Tensor]:
        height, width = image.shape[2:]
        coarsest = self.strides[-1]
        if height % coarsest or width % coarsest:  # some models refuse such sizes, others round the maps down
            image = F.pad(image, (0, -width % coarsest, 0, -height % coarsest))
        maps = self.model(image)
        if self.channels_last_maps:
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        if self.pyramid is not None:
            maps = self.pyramid(maps[-1])
        return [x[:, :, : -(-height // s), : -(-width // s)] for x, s in zip(maps[-MAPS:], self.strides, strict=True)]


class SimplePyramid(nn.Module):
    """Four maps from one of stride s: strides s / 4, s / 2, s and 2 s, with dim / 4, dim / 2, dim and dim channels.

    Shape: (batch, dim, rows, columns) -> four maps.
    """

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        if stride % 4:
            raise ValueError(f"a feature pyramid needs a stride that 4 divides, got {stride}")
        self.channels: Sequence[int] = (dim // 4, dim // 2, dim, dim)
        self.strides: Sequence[int] = (stride // 4, stride // 2, stride, 2 * stride)
        half = nn.ConvTranspose2d(dim, dim // 2, 2, 2)
        quarter = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, 2, 2),
            LayerNorm2d(dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
        )
        self.ways = nn.ModuleList([quarter, half, nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])

    def forward(self, x: Float[Tensor, "batch dim rows columns"]) -> list[Float[Tensor, "batch channels height width"]]:
        """The maps, the finest first."""
        return [way(x) for way in self.ways]


def _masked_model(name: str, **options: Any) -> nn.Module | None:
    """A model of ours that takes a mask, as it is; None for any other."""
    if name not in list_models():
        return None
    model: Any = create_model(name, num_classes=0, **options)
    return model if "mask" in inspect.signature(model.forward_intermediates).parameters else None


def _timm_features(name: str, **options: Any) -> nn.Module:
    for any_size in _ANY_SIZE:
        try:
            return create_model(name, features_only=True, **{**any_size, **options})
        except TypeError as error:
            if not any(key in str(error) for key in any_size):
                raise
    raise AssertionError("the last attempt adds no keyword")
