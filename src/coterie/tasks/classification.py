"""One label per image: cross-entropy, mixup and cutmix from timm, accuracies from torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from coterie.tasks import Batch, PictureTask

TOP = 5
CONFUSIONS_SHOWN = 3


class Classification(PictureTask):
    """Classify images into `classes`.

    A batch holds `image` (batch, channels, height, width), `label` (batch,) int64 and `index` (batch,) int64; in
    training `prepare_batch` may add `target` (batch, classes), the soft labels of mixed images.

    Args:
        classes: Names of the classes, in the order of the labels.
        augment: `mixup`, `cutmix` (their alphas) and `label_smoothing`, all 0 where missing.
    """

    summary = "accuracy"
    target: ClassVar[str] = "class"
    masks: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "data.source": "digits",
        "schedule.warmup_epochs": 1.0,
        "optim.lr": 1e-3,
        "train.epochs": 10,
        "train.batch_size": 64,
    }

    def __init__(self, classes: Sequence[str], *, augment: Mapping[str, Any]) -> None:
        self.classes = list(classes)
        self.label_smoothing = float(augment.get("label_smoothing", 0.0))
        self._mixup = self._build_mixup(float(augment.get("mixup", 0.0)), float(augment.get("cutmix", 0.0)))

    def _build_mixup(self, mixup: float, cutmix: float) -> Any:
        if not mixup and not cutmix:
            return None
        from timm.data.mixup import Mixup

        return Mixup(mixup, cutmix, label_smoothing=self.label_smoothing, num_classes=len(self.classes))

    def build_model(self, config: Any, source: Any) -> nn.Module:
        """The model `config.name` for the channels and classes of `source`.

        Raises:
            ValueError: an unknown model, or options it does not take.
        """
        import coterie

        options = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        try:
            return coterie.create_model(
                config.name, in_chans=source.channels, num_classes=len(source.classes), **options, **config.options
            )
        except TypeError as error:  # a keyword that the constructor does not know
            raise ValueError(f"model {config.name}: {error}; see model.options") from error

    def prepare_batch(self, batch: Batch) -> Batch:
        """Mix the images of the batch, where mixup or cutmix is on, in pairs: an odd last image is left out."""
        if self._mixup is None:
            return batch
        even = len(batch["label"]) // 2 * 2
        batch = {name: value[:even] for name, value in batch.items()}
        image, target = self._mixup(batch["image"].clone(), batch["label"])
        return {**batch, "image": image, "target": target}

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over the batch in float32; smoothed in training only. `output` holds the logits."""
        logits = self.predict(model, batch)
        target = batch["target"] if "target" in batch else batch["label"]
        smoothing = self.label_smoothing if model.training and "target" not in batch else 0.0
        return {"loss": functional.cross_entropy(logits, target, label_smoothing=smoothing), "output": logits}

    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """The logits, in float32."""
        return model(batch["image"]).float()

    def metrics(self) -> Any:
        """Accuracy, mean accuracy over classes, confusion matrix; from five classes on accuracy within the top 5."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        count = len(self.classes)
        chosen: dict[str, Any] = {
            "accuracy": MulticlassAccuracy(count, average="micro"),
            "macro_accuracy": MulticlassAccuracy(count, average="macro"),
            "confusion": MulticlassConfusionMatrix(count),
        }
        if count >= TOP:
            chosen["top5_accuracy"] = MulticlassAccuracy(count, average="micro", top_k=TOP)
        return MetricCollection(chosen, compute_groups=False)

    def update(self, metrics: Any, output: Float[Tensor, "batch classes"], batch: Batch) -> None:
        """Add one batch of logits."""
        metrics.update(output, batch["label"])

    def report(self, metrics: Any) -> dict[str, float]:
        """The accuracies as numbers from 0 to 1."""
        return {name: value.item() for name, value in metrics.compute().items() if value.ndim == 0}

    def comment(self, metrics: Any) -> list[str]:
        """Sentences for people: which classes are taken for one another most often."""
        confusion = metrics["confusion"].compute().cpu()
        wrong = confusion.clone().fill_diagonal_(0)
        sentences = []
        for flat in wrong.flatten().argsort(descending=True)[:CONFUSIONS_SHOWN].tolist():
            true, taken = divmod(flat, len(self.classes))
            if count := int(wrong[true, taken]):
                times = f"{count} of {int(confusion[true].sum())}"
                sentences.append(f"{times} images of {self.classes[true]} are taken for {self.classes[taken]}")
        return sentences

    def collect(self, output: Float[Tensor, "batch classes"], batch: Batch) -> dict[str, Tensor]:
        """Probabilities in float16, labels and sample numbers."""
        return {
            "probabilities": output.float().softmax(-1).half(),
            "labels": batch["label"],
            "indices": batch["index"],
        }

    def describe(self, output: Float[Tensor, "batch classes"]) -> list[list[tuple[str, float]]]:
        """All classes with their probabilities, the most probable first."""
        probabilities, order = output.float().softmax(-1).sort(-1, descending=True)
        return [
            [(self.classes[label], probability) for label, probability in zip(labels, row, strict=True)]
            for labels, row in zip(order.tolist(), probabilities.tolist(), strict=True)
        ]

    def answers(self, output: Float[Tensor, "batch classes"], batch: Batch) -> list[list[tuple[str, float]]]:
        """As `describe`."""
        return self.describe(output)

    def draw(self, axes: Any, image: Any, output: Float[Tensor, " classes"], label: int | None = None) -> None:
        """Draw a PIL image into matplotlib axes, titled with the answer, and with the true class where it differs."""
        (name, probability), *_ = self.describe(output[None])[0]
        truth = name if label is None else self.classes[label]
        axes.imshow(image, cmap="gray" if image.mode == "L" else None)
        axes.set_axis_off()
        title = f"{name} ({probability:.0%})" + ("" if truth == name else f", is {truth}")
        axes.set_title(title, color="black" if truth == name else "#b3261e", fontsize=9)
