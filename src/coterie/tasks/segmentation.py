"""One label per pixel: cross-entropy and Dice in training, intersection over union by class in evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from coterie.tasks import Batch, PictureTask
from coterie.tasks._dense import BACKGROUND_NAMES, build_backbone, class_colors, with_legend, without_padding
from coterie.tasks._segmenter import DECODERS, MULTIPLE, Segmenter

if TYPE_CHECKING:
    from PIL import Image

IGNORE = 255
WORST_SHOWN = 3
OVERLAY = 0.55


class SemanticSegmentation(PictureTask):
    """Label every pixel with one of `classes`.

    A training batch holds `image` (batch, channels, height, width), `label_map` (batch, height, width) int64 where 255
    is ignored, and `mask` (batch, height, width) bool where images are padded. In evaluation, `truth` is a list of
    label maps (h, w) at the original resolution, and `size`, `original_size` (batch, 2) are the (h, w) of the image
    without padding and of the original. The output there is a list of label maps (h, w) uint8, at
    the original resolution.

    Args:
        classes: Names of the classes, in the order of the labels.
        augment: not used: images are mixed in classification only.
        decoder: "upernet" or "fpn".
        channels: width of the decoder, a multiple of 64.
        dice: weight of the Dice loss beside cross-entropy.
        auxiliary: weight of the auxiliary head's cross-entropy; 0 leaves the head out.
        scales: in evaluation, the sizes of the image over which probabilities are averaged, 1 is its own.
        flip: in evaluation, average over the mirrored image too.
        window: in evaluation, the side of the square windows in which larger images are computed, in pixels; whole
            images if None.
        overlap: share of a window that the next one covers again.
        frozen_batch_norm: batch normalisations of the backbone stay as they are.
    """

    summary = "miou"
    target: ClassVar[str] = "label_map"
    masks: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "data.source": "digit-scenes",
        "schedule.warmup_epochs": 1.0,
        "optim.lr": 1e-3,
        "train.epochs": 50,
        "train.batch_size": 8,
    }

    def __init__(
        self,
        classes: Sequence[str],
        *,
        augment: Mapping[str, Any] | None = None,
        decoder: str = "upernet",
        channels: int = 128,
        dice: float = 0.0,
        auxiliary: float = 0.4,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int | None = None,
        overlap: float = 1 / 3,
        frozen_batch_norm: bool = False,
    ) -> None:
        self.classes = list(classes)
        if not 1 <= len(self.classes) <= IGNORE:
            raise ValueError(f"classes must be 1 to {IGNORE} (label {IGNORE} is ignored), got {len(self.classes)}")
        if decoder not in DECODERS:
            raise ValueError(f"task.options.decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        if channels < MULTIPLE or channels % MULTIPLE:
            raise ValueError(f"task.options.channels must be a multiple of {MULTIPLE}, got {channels}")
        for name, weight in (("dice", dice), ("auxiliary", auxiliary)):
            if weight < 0:
                raise ValueError(f"task.options.{name} must be at least 0, got {weight}")
        if not scales or min(scales) <= 0:
            raise ValueError(f"task.options.scales must be numbers above 0, got {scales!r}")
        if window is not None and window < 32:
            raise ValueError(f"task.options.window must be at least 32 pixels, got {window}")
        if not 0 <= overlap < 1:
            raise ValueError(f"task.options.overlap must be at least 0 and below 1, got {overlap}")
        self.decoder, self.channels, self.dice, self.auxiliary = decoder, channels, dice, auxiliary
        self.scales, self.flip, self.window, self.overlap = tuple(scales), flip, window, overlap
        self.frozen_batch_norm = frozen_batch_norm

    def build_model(self, config: Any, source: Any) -> nn.Module:
        """Backbone `config.name` and the decoder, for the channels and classes of `source`."""
        return Segmenter(
            build_backbone(config, source, frozen_batch_norm=self.frozen_batch_norm),
            len(source.classes),
            decoder=self.decoder,
            channels=self.channels,
            auxiliary=self.auxiliary > 0,
        )

    def prepare_batch(self, batch: Batch) -> Batch:
        """Nothing."""
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """Mean over labelled pixels, 0 where there are none; in evaluation at the original resolution.

        `output`: the logits in training, in evaluation a list of label maps.
        """
        if not model.training:
            return self._evaluate(model, batch)
        logits, *auxiliary = (score.float() for score in model(batch["image"], batch.get("mask")))
        labels = batch["label_map"]
        loss = _cross_entropy(logits, labels)
        if auxiliary:
            loss = loss + self.auxiliary * _cross_entropy(auxiliary[0], labels)
        if self.dice:
            from segmentation_models_pytorch.losses import DiceLoss

            loss = loss + self.dice * DiceLoss("multiclass", ignore_index=IGNORE)(logits, labels)
        return {"loss": loss, "output": logits}

    def predict(self, model: nn.Module, batch: Batch) -> list[Int[Tensor, "height width"]]:
        """A label map for each image, at its original resolution."""
        return self._evaluate(model, {name: value for name, value in batch.items() if name != "truth"})["output"]

    def _evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        maps, total, count = [], batch["image"].new_zeros((), dtype=torch.float32), 0
        scores = (one[None] for images in without_padding(batch) for one in self._scores(model, images))
        for row, (full, original) in enumerate(zip(scores, batch["original_size"].tolist(), strict=True)):
            if list(full.shape[2:]) != original:
                full = F.interpolate(full, original, mode="bilinear", align_corners=False)
            maps.append(full[0].argmax(0).to(torch.uint8))
            if "truth" in batch:
                truth = batch["truth"][row][None]
                total = total + F.cross_entropy(full, truth, ignore_index=IGNORE, reduction="sum")
                count += int((truth != IGNORE).sum())
        result: dict[str, Any] = {"output": maps}
        if "truth" in batch:
            result["loss"] = total / max(count, 1)
        return result

    def _scores(
        self, model: nn.Module, image: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Logits; with several scales or mirroring the logarithm of the mean probabilities."""
        if self.scales == (1.0,) and not self.flip:
            return self._windows(model, image)
        size = image.shape[2:]
        mean: Any = 0.0
        ways = len(self.scales) * (1 + self.flip)
        for scale in self.scales:
            scaled = [max(1, round(side * scale)) for side in size]
            x = image if scale == 1.0 else F.interpolate(image, scaled, mode="bilinear", antialias=True)
            for flipped in (False, True)[: 1 + self.flip]:
                y = self._windows(model, x.flip(-1)).flip(-1) if flipped else self._windows(model, x)
                y = F.interpolate(y, size, mode="bilinear", align_corners=False)
                mean = mean + y.softmax(1) / ways
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def _windows(self, model: nn.Module, image: Tensor) -> Tensor:
        """Logits of the whole image, or the mean over the windows that lie on each pixel."""
        height, width = image.shape[2:]
        if self.window is None or max(height, width) <= self.window:
            return model(image).float()
        step = max(1, round(self.window * (1 - self.overlap)))
        total = image.new_zeros((), dtype=torch.float32)
        total = total.new_zeros(len(image), len(self.classes), height, width)
        count = total.new_zeros(height, width)
        for top in _starts(height, self.window, step):
            for left in _starts(width, self.window, step):
                place = slice(top, top + self.window), slice(left, left + self.window)
                total[:, :, *place] += model(image[:, :, *place]).float()
                count[place] += 1
        return total / count

    def metrics(self) -> Any:
        """torchmetrics' confusion matrix, over the pixels of the whole split; everything else follows from it."""
        from torchmetrics.classification import MulticlassConfusionMatrix

        return MulticlassConfusionMatrix(len(self.classes), ignore_index=IGNORE, validate_args=False)

    def update(self, metrics: Any, output: list[Int[Tensor, "height width"]], batch: Batch) -> None:
        """Add the label maps of one batch."""
        for label_map, truth in zip(output, batch["truth"], strict=True):
            metrics.update(label_map.long()[None], truth[None])

    def report(self, metrics: Any) -> dict[str, float]:
        """Mean IoU over the classes that occur in truth or answer, mean accuracy of classes, accuracy of pixels."""
        confusion, union = _confusion(metrics)
        right, true = confusion.diagonal(), confusion.sum(1)
        return {
            "miou": _mean(right[union > 0] / union[union > 0]),
            "mean_accuracy": _mean(right[true > 0] / true[true > 0]),
            "pixel_accuracy": float(right.sum() / true.sum()) if true.sum() else 0.0,
        }

    def comment(self, metrics: Any) -> list[str]:
        """Sentences for people: the worst classes, and what they are taken for."""
        confusion, union = _confusion(metrics)
        overlap = torch.where(union > 0, confusion.diagonal() / union.clamp_min(1), torch.inf)
        sentences = []
        for label in overlap.argsort()[:WORST_SHOWN].tolist():
            if not overlap[label].isfinite():
                break
            sentence = f"{self.classes[label]}: IoU {overlap[label]:.3f}"
            wrong = confusion[label].clone()
            wrong[label] = 0
            if true := float(confusion[label].sum()):
                taken = int(wrong.argmax())
                if share := float(wrong[taken]) / true:
                    sentence += f"; {share:.0%} of its pixels are taken for {self.classes[taken]}"
            else:
                sentence += "; it does not occur, and yet is answered"
            sentences.append(sentence)
        return sentences

    def collect(self, output: list[Int[Tensor, "height width"]], batch: Batch) -> dict[str, Tensor]:
        """Sample numbers and for each image its confusion matrix (classes, classes): rows true, columns answered."""
        count = len(self.classes)
        matrices = []
        for label_map, truth in zip(output, batch["truth"], strict=True):
            known = truth != IGNORE
            pairs = truth[known] * count + label_map[known].long()
            matrices.append(torch.bincount(pairs, minlength=count * count).view(count, count))
        return {"indices": batch["index"], "confusion": torch.stack(matrices)}

    def answers(self, output: list[Int[Tensor, "height width"]], batch: Batch) -> list[dict[str, np.ndarray]]:
        """For each image {"label_map": (h, w) uint8}."""
        return [{"label_map": label_map.cpu().numpy()} for label_map in output]

    def palette(self) -> list[tuple[int, int, int]]:
        """The colour of each class, as `draw` uses it; background is black, and left clear by `draw`."""
        return [tuple(color) for color in class_colors(self.classes).tolist()]

    def draw(self, image: Image.Image, answer: Mapping[str, np.ndarray]) -> Image.Image:
        """The image under its label map in colours, above a legend of the classes in it; the largest first."""
        from PIL import Image

        colors = class_colors(self.classes)
        label_map = answer["label_map"]
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
        clear = [number for number, name in enumerate(self.classes) if name.lower() in BACKGROUND_NAMES]
        known = (label_map < len(colors)) & ~np.isin(label_map, clear)
        pixels[known] = (1 - OVERLAY) * pixels[known] + OVERLAY * colors[label_map[known]]
        amounts = np.bincount(label_map[known], minlength=len(colors))
        shown = [number for number in np.argsort(-amounts, kind="stable") if amounts[number]]
        picture = Image.fromarray(pixels.round().astype(np.uint8))
        return with_legend(picture, [(self.classes[number], colors[number]) for number in shown])


def _cross_entropy(
    logits: Float[Tensor, "batch classes height width"], labels: Int[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Mean over the labelled pixels; 0, with a gradient of 0, where there are none."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


def _starts(length: int, window: int, step: int) -> Iterator[int]:
    """Where windows begin that cover a length; the last one ends with it."""
    last = max(0, length - window)
    yield from range(0, last, step)
    yield last


def _confusion(metrics: Any) -> tuple[Float[Tensor, "classes classes"], Float[Tensor, " classes"]]:
    """Pixels by true and answered class, and the size of each class' union of both."""
    confusion = metrics.compute().double().cpu().reshape(metrics.num_classes, -1)  # squeezed for one class
    return confusion, confusion.sum(0) + confusion.sum(1) - confusion.diagonal()


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
