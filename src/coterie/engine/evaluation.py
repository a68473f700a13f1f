"""Figures of a model on a split, and answers for single images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from coterie.data import DataSource
from coterie.engine.batches import select, to_device
from coterie.engine.distributed import any_rank, make_accelerator
from coterie.engine.inputs import WHOLE, BadSample, Reader, build_loader, match_classes, open_source
from coterie.engine.runs import LoadedRun, load_run
from coterie.tasks import Batch, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Evaluation:
    """What `evaluate` and the loop get of a split.

    Attributes:
        figures: `loss`, where the task has one in evaluation, and the task's figures.
        images: How many images were looked at.
        samples: What the task collects, in the order of the split; empty unless it was asked for.
        comments: Sentences for people.
    """

    figures: dict[str, float]
    images: int
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)


@dataclass
class Prediction:
    """What a trained run says about one image file.

    Attributes:
        path: The file.
        answers: What the task's `answers` gives: for classification (name, certainty) pairs, the most certain first;
            for dense tasks a dictionary of arrays in the pixels of the file.
        image: The picture as it was read; not set for classification.
        error: Why there is no answer.
    """

    path: str
    answers: Any = ()
    image: Image.Image | None = None
    error: str | None = None


@torch.inference_mode()
def evaluate_split(
    task: Task, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, *, collect: bool = False
) -> Evaluation:
    """Run `model` over the batches of this rank; the figures are those of all ranks together."""
    from torchmetrics import MeanMetric, SumMetric

    was_training = model.training
    model.eval()
    metrics = task.metrics().to(accelerator.device)
    mean_loss, count = MeanMetric().to(accelerator.device), SumMetric().to(accelerator.device)
    has_loss = False
    collected: list[dict[str, np.ndarray]] = []
    for batch in batches:
        real = batch["index"] >= 0  # with several ranks the last batch is filled up with rows of index -1
        if not real.any():
            continue
        batch = to_device(select(batch, real), accelerator.device)
        with accelerator.autocast():
            result = task.loss(model, batch)
        task.update(metrics, result["output"], batch)
        count.update(len(batch["index"]))
        if "loss" in result:  # detectors give theirs in training only
            has_loss = True
            mean_loss.update(result["loss"], weight=len(batch["index"]))
        if collect:
            collected.append({name: _array(value) for name, value in task.collect(result["output"], batch).items()})
    figures = {"loss": mean_loss.compute().item()} if any_rank(accelerator, has_loss) else {}
    figures |= task.report(metrics)
    comments = task.comment(metrics)
    model.train(was_training)
    samples = _join(collected, accelerator) if collect else {}
    return Evaluation(figures, int(count.compute().item()), samples, comments)


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, Tensor) else value


def _join(parts: list[dict[str, np.ndarray]], accelerator: Accelerator) -> dict[str, np.ndarray]:
    """All ranks' samples, sorted by their number in the split."""
    from accelerate.utils import gather_object

    if accelerator.num_processes > 1:
        parts = gather_object(parts)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["indices"], kind="stable")
    return {name: values[order] for name, values in joined.items()}


def evaluate(
    run_dir: str | Path, *, data: str | None = None, split: str = "test", weights: str = "final", device: str = "auto"
) -> Evaluation:
    """Evaluate a trained run.

    Args:
        run_dir: The run folder.
        data: Data to evaluate on, as `coterie.data.open_data` takes it; that of the run if not given. Its classes are
            matched to the run's by name.
        split: `train`, `validation` or `test`.
        weights: `final` or `best`.
        device: `auto` or `cpu`.

    Raises:
        ValueError: classes or channels that do not fit the run, or a split that the data does not have.
        FileNotFoundError: no run, or no data.
    """
    run = load_run(run_dir, weights)
    config = run.config
    config.train.device = "cpu" if device == "cpu" else "auto"
    if data is not None:
        config.data.source = data
    source = open_source(config, run.source.tokenizer)
    if split not in source.splits:
        raise ValueError(f"split: got {split!r}; {source.name} has {', '.join(source.splits)}")
    if isinstance(source, DataSource):
        source = match_classes(source, run.source.classes)
    accelerator = make_accelerator(config.train)
    model = run.model.to(accelerator.device)
    loader = build_loader(source, split, run.source, config, accelerator, train=False)
    return evaluate_split(run.task, model, loader.batches(0, 0, train=False), accelerator, collect=True)


class Predictor:
    """A loaded run that answers for pictures.

    Args:
        run: As `load_run` gives it; its model is moved to the device.
        device: `auto` or `cpu`.
    """

    def __init__(self, run: LoadedRun, device: str = "auto") -> None:
        self.run = run
        run.config.train.device = "cpu" if device == "cpu" else "auto"
        self._accelerator = make_accelerator(run.config.train)
        self._model = run.model.to(self._accelerator.device)
        self.reader = Reader(run.source)

    @torch.inference_mode()
    def answer(self, images: Sequence[Image.Image]) -> list[Any]:
        """What the task's `answers` gives for each of the pictures, computed together."""
        batch = to_device(self.reader.batch(images), self._accelerator.device)
        with self._accelerator.autocast():
            output = self.run.task.predict(self._model, batch)
        return self.run.task.answers(output, batch)


def predict(
    run_dir: str | Path | LoadedRun,
    paths: Sequence[str | Path],
    *,
    weights: str = "final",
    device: str = "auto",
    batch_size: int | None = None,
) -> Iterator[Prediction]:
    """Answer for image files with a trained run, in their order; one that cannot be read gets an `error`.

    Args:
        run_dir: The run folder, or a run that was loaded already.
        paths: Image files.
        weights: `final` or `best`, where a folder is given.
        device: `auto` or `cpu`.
        batch_size: Images computed at once; if not given, 64 for classification and one at a time for dense tasks.
    """
    run = run_dir if isinstance(run_dir, LoadedRun) else load_run(run_dir, weights)
    predictor, whole = Predictor(run, device), run.source.target == WHOLE
    batch_size = batch_size or (64 if whole else 1)
    for start in range(0, len(paths), batch_size):
        predictions = [Prediction(str(path)) for path in paths[start : start + batch_size]]
        images: list[Image.Image] = []
        readable = []
        for prediction in predictions:
            try:
                images.append(predictor.reader.image(prediction.path))
                readable.append(prediction)
            except BadSample as bad:
                prediction.error = bad.reason
        if images:
            for prediction, image, answers in zip(readable, images, predictor.answer(images), strict=True):
                prediction.answers, prediction.image = answers, None if whole else image
        yield from predictions
