"""What a model is trained for. The engine trains any object with the methods of `Task`, and knows no task by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Tensor]


class Task(Protocol):
    """What the engine asks of a task.

    Attributes:
        summary: Name of the metric by which runs are compared; larger is better.
    """

    summary: str

    def build_model(self, config: Any, source: Any) -> nn.Module:
        """The model for `source`; `config` has `name`, `options` and `drop_path`."""

    def prepare_batch(self, batch: Batch) -> Batch:
        """What is done to a training batch on the device (mixup). Draws only from the global random generators."""

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`loss`, the mean over the batch, and `output`, what the metrics take."""

    def metrics(self) -> Any:
        """A fresh torchmetrics collection of everything that evaluation reports."""

    def update(self, metrics: Any, output: Tensor, batch: Batch) -> None:
        """Add the output of one batch to the metrics."""

    def report(self, metrics: Any) -> dict[str, float]:
        """The figures that the log keeps."""

    def comment(self, metrics: Any) -> list[str]:
        """Sentences about the figures, for people."""

    def collect(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What is stored about each sample of the batch, first dimension the samples."""

    def describe(self, output: Tensor) -> list[list[tuple[str, float]]]:
        """For people: the answer for each sample, as (name, certainty) pairs, the most certain first."""


def _classification() -> type:
    from coterie.tasks.classification import Classification

    return Classification


_TASKS: dict[str, Callable[[], type]] = {"classification": _classification}


def list_tasks() -> list[str]:
    """Names that `create_task` takes."""
    return sorted(_TASKS)


def create_task(name: str, *, classes: Sequence[str], augment: Any = None, **options: Any) -> Task:
    """A task by name.

    Args:
        name: One of `list_tasks()`.
        classes: Names of the classes, in the order of the labels.
        augment: Object or mapping with what the task varies in training (`mixup`, `cutmix`, `label_smoothing`).
        options: Further keyword arguments of the task.

    Raises:
        ValueError: an unknown name.
        TypeError: an option that the task does not take.
    """
    if name not in _TASKS:
        close = difflib.get_close_matches(name, _TASKS, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"task: got {name!r}, takes one of {', '.join(list_tasks())}{hint}")
    values = augment if isinstance(augment, Mapping) else vars(augment) if augment is not None else {}
    return _TASKS[name]()(classes, augment=values, **options)


__all__ = ["Batch", "Task", "create_task", "list_tasks"]
