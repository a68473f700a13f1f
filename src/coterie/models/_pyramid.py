"""timm's model interface over a pyramid: a stem, stages that each make the map coarser, a norm and a head.

A vision model here subclasses `Pyramid`, builds its parts in `__init__` and has with that what everything built on timm
asks for: features_only, forward_intermediates, pruning, a new classifier, checkpointing, layer groups; and masks for
batches of images of different sizes. Feature maps between the parts are (batch, channels, height, width),
channels-last in memory, so that a stage sees its tokens as a grid without a copy (`coterie.layers.layout`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from jaxtyping import Bool, Float
from timm.models import checkpoint_seq
from torch import Tensor, nn

from coterie.layers.layout import to_grid, to_map
from coterie.layers.padding import strided
from coterie.models._checks import check_count, check_images, check_mask, stage_indices


class PyramidStage(nn.Module):
    """What a stage has in common with others: it may make the map coarser, then runs its blocks on the token grid.

    A subclass sets `downsample`, a module called as `downsample(map or grid, mask)` that returns a token grid, and
    `blocks`, called as `block(grid, mask)`.

    Args:
        stride: how much coarser its map is than what it gets; 1 for a stage that begins right after the stem.

    Shape: feature map (batch, in_dim, H, W) -> (batch, dim, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    downsample: nn.Module
    blocks: nn.Sequential

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.grad_checkpointing = False

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Apply the stage; `mask` (True = real) belongs to the input."""
        x = self.downsample(x, mask)
        mask = strided(mask, self.stride)
        if mask is None:
            x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
            return to_map(x)
        blocks = [partial(block, mask=mask) for block in self.blocks]
        if self.grad_checkpointing:
            return to_map(checkpoint_seq(blocks, x))
        for block in blocks:
            x = block(x)
        return to_map(x)


class AsGrid(nn.Module):
    """What begins a stage that merges nothing: the stem's map, seen as a token grid.

    Shape: (batch, dim, height, width) -> (batch, height, width, dim).
    """

    def forward(
        self, x: Float[Tensor, "batch dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """The same numbers, in the other view."""
        return to_grid(x)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth of each block, by stage: linear from 0 in the first block up to `rate` in the last."""
    blocks = sum(depths)
    rates = iter([rate * block / max(1, blocks - 1) for block in range(blocks)])
    return [[next(rates) for _ in range(depth)] for depth in depths]


class Pyramid(nn.Module):
    """timm's interface; see the module's docstring.

    A subclass's `__init__` sets: `in_chans`, `num_classes`, `stem` (called as `stem(images, mask)`, gives a map),
    `stem_stride`, `stages` (an nn.Sequential of PyramidStage), `norm` (on token grids unless the subclass overrides
    `final_norm`), `head` (called as `head(map, pre_logits=...)`; timm's ClassifierHead, or one with its `reset` and
    `num_features`),
    `num_features`, `head_hidden_size` and `feature_info` (one mapping per stage, with "num_chs").
    """

    in_chans: int
    num_classes: int
    stem: nn.Module
    stem_stride: int
    stages: nn.Sequential
    norm: nn.Module
    head: Any
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare, beyond vectors and biases."""
        return {
            f"{path}.{name}"
            for path, module in self.named_modules()
            if module is not self and hasattr(module, "no_weight_decay")
            for name in module.no_weight_decay()
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put parameters into layer groups: by stage if `coarse`, else by block."""
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.modules():
            if isinstance(stage, PyramidStage):
                stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer (Identity if there are no classes)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new classifier (none for 0 classes), and a pooling if given; there is nothing `other` to reset."""
        check_count("num_classes", num_classes, least=0)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch in_chans height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        mask: Bool[Tensor, "batch height width"] | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of the stages.

        Args:
            x: images.
            indices: which stages: the last n if an int, all if None.
            norm: apply the final norm to the last stage's map.
            stop_early: do not run stages after the last wanted one.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: return only the list.
            mask: True at real pixels, False at the padding of images that are smaller than the batch. Padding is no
                key, moves no centroid and counts in no statistics; what the maps hold there means nothing.

        Returns:
            (final features NCHW, list of maps), or the list.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        wanted = stage_indices(indices, len(self.stages))
        x = self.stem(check_images(x, self.in_chans), check_mask(mask, x))
        mask = strided(mask, self.stem_stride)
        intermediates: list[Tensor] = []
        last = len(self.stages) - 1
        for index, stage in enumerate(self.stages[: max(wanted) + 1] if stop_early else self.stages):
            x = stage(x, mask)
            mask = strided(mask, stage.stride)  # type: ignore[arg-type]  # every stage has a stride
            if index in wanted:
                out = self.final_norm(x, mask) if norm and index == last else x
                intermediates.append(out if output_fmt == "NCHW" else to_grid(out))
        if intermediates_only:
            return intermediates
        return (self.final_norm(x, mask) if index == last else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted one, and with them norm and head. Returns the indices kept."""
        wanted = stage_indices(indices, len(self.stages))
        last_wanted = max(wanted)
        shortened = last_wanted < len(self.stages) - 1
        if prune_norm or shortened:
            self.norm = nn.Identity()
        self.stages = self.stages[: last_wanted + 1]
        if shortened:
            self.num_features = self.feature_info[last_wanted]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "", reset_other=True)
        return wanted

    def forward_features(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The last stage's feature map, normalised; `mask` as in `forward_intermediates`."""
        if mask is None:
            return self.final_norm(self.stages(self.stem(check_images(x, self.in_chans))))
        features = self.forward_intermediates(x, 1, mask=mask)[0]
        assert isinstance(features, Tensor)
        return features

    def forward_head(
        self, x: Float[Tensor, "batch dim rows columns"], pre_logits: bool = False
    ) -> Float[Tensor, "batch ..."]:
        """Logits from `forward_features`; with `pre_logits` what the classifier would get."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Float[Tensor, "batch in_chans height width"]) -> Float[Tensor, "batch ..."]:
        """Logits."""
        return self.forward_head(self.forward_features(x))

    def final_norm(
        self, x: Float[Tensor, "batch dim rows columns"], mask: Bool[Tensor, "batch rows columns"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The norm after the last stage, on its map; `mask` is for norms that look beyond a token."""
        return to_map(self.norm(to_grid(x)))
