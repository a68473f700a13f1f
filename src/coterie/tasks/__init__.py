"""What a model is trained for. The engine trains any object with the methods of `Task`, and knows no task by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

Batch = dict[str, Any]
"""Tensors with one row per sample, or lists with one entry per sample."""


class Task(Protocol):
    """What the engine asks of a task.

    Attributes:
        summary: Name of the figure by which runs are compared.
        larger_is_better: Whether that figure grows or falls as models get better.
        unit: What the speed of training is counted in.
        target: What a sample is labelled with: "class", "label_map", "instances", or "text" for text without labels.
        masks: Whether instances must come with their masks.
        defaults: Dotted names of configuration fields, and what they are where the user leaves them open.
    """

    summary: str
    larger_is_better: ClassVar[bool]
    unit: ClassVar[str]
    target: ClassVar[str]
    masks: ClassVar[bool]
    defaults: ClassVar[dict[str, Any]]

    def build_model(self, config: Any, source: Any) -> nn.Module:
        """The model for `source`; `config` has `name`, `options` and `drop_path`."""

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Numbers about the model that the log keeps from the beginning."""

    def sample(self, model: nn.Module, seed: int) -> str | None:
        """Something that the model makes after an evaluation, for people to look at; a function of weights and seed."""

    def prepare_batch(self, batch: Batch) -> Batch:
        """What is done to a training batch on the device (mixup). Draws only from the global random generators."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """`loss`, the mean over the batch, and `output`, what the metrics take.

        In evaluation a task may leave `loss` out (detectors give none there).
        """

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """`output` as `loss` gives it in evaluation, for a batch that need not hold the truth."""

    def metrics(self) -> Any:
        """A fresh torchmetrics metric or collection of everything that evaluation reports."""

    def update(self, metrics: Any, output: Any, batch: Batch) -> None:
        """Add the output of one batch to the metrics."""

    def report(self, metrics: Any) -> dict[str, float]:
        """The figures that the log keeps."""

    def comment(self, metrics: Any) -> list[str]:
        """Sentences about the figures, for people."""

    def collect(self, output: Any, batch: Batch) -> dict[str, Tensor | np.ndarray]:
        """What is stored about the batch: arrays with one common first dimension, and of it `indices`, the samples."""

    def answers(self, output: Any, batch: Batch) -> list[Any]:
        """One plain object for each sample of the batch: what `coterie predict` says, draws and writes."""


class PictureTask:
    """What tasks on pictures have in common."""

    larger_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "images"

    def facts(self, model: nn.Module) -> dict[str, Any]:
        """Nothing beyond what the engine says of every model."""
        return {}

    def sample(self, model: nn.Module, seed: int) -> str | None:
        """These models make nothing."""
        return None


def _classification() -> type:
    from coterie.tasks.classification import Classification

    return Classification


def _semantic_segmentation() -> type:
    from coterie.tasks.segmentation import SemanticSegmentation

    return SemanticSegmentation


def _object_detection() -> type:
    from coterie.tasks.detection import ObjectDetection

    return ObjectDetection


def _instance_segmentation() -> type:
    from coterie.tasks.detection import InstanceSegmentation

    return InstanceSegmentation


def _language_modeling() -> type:
    from coterie.tasks.language_modeling import LanguageModeling

    return LanguageModeling


_TASKS: dict[str, Callable[[], type]] = {
    "classification": _classification,
    "semantic-segmentation": _semantic_segmentation,
    "object-detection": _object_detection,
    "instance-segmentation": _instance_segmentation,
    "language-modeling": _language_modeling,
}


def list_tasks() -> list[str]:
    """Names that `create_task` takes."""
    return sorted(_TASKS)


def task_class(name: str) -> Any:
    """The class behind a name, to read its `target` and `defaults` from before the data is opened.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _TASKS:
        close = difflib.get_close_matches(name, _TASKS, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"task: got {name!r}, takes one of {', '.join(list_tasks())}{hint}")
    return _TASKS[name]()


def create_task(name: str, *, classes: Sequence[str], augment: Any = None, **options: Any) -> Task:
    """A task by name.

    Args:
        name: One of `list_tasks()`.
        classes: Names of the classes, in the order of the labels.
        augment: Object or mapping with what the task varies in training (`mixup`, `cutmix`, `label_smoothing`).
        options: Further keyword arguments of the task.

    Raises:
        ValueError: an unknown name, or an option's value that the task does not take.
        TypeError: an option that the task does not take.
    """
    values = augment if isinstance(augment, Mapping) else vars(augment) if augment is not None else {}
    return task_class(name)(classes, augment=values, **options)


__all__ = ["Batch", "PictureTask", "Task", "create_task", "list_tasks", "task_class"]
