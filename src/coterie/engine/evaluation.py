"""Figures of a model on a split, and answers for single images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from coterie.engine.distributed import make_accelerator
from coterie.engine.inputs import BadSample, build_loader, match_source, open_source, reader
from coterie.engine.runs import load_run
from coterie.tasks import Batch, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Evaluation:
    """What `evaluate` and the loop get of a split.

    Attributes:
        figures: `loss` and the task's figures.
        samples: What the task collects of each sample, in the order of the split; empty unless it was asked for.
        comments: Sentences for people.
    """

    figures: dict[str, float]
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)


@dataclass
class Prediction:
    """The answer for one image: `answers` are (name, certainty) pairs, the most certain first; or `error`."""

    path: str
    answers: list[tuple[str, float]] = field(default_factory=list)
    error: str | None = None


@torch.inference_mode()
def evaluate_split(
    task: Task, model: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, *, collect: bool = False
) -> Evaluation:
    """Run `model` over the batches of this rank; the figures are those of all ranks together."""
    from torchmetrics import MeanMetric

    was_training = model.training
    model.eval()
    metrics = task.metrics().to(accelerator.device)
    mean_loss = MeanMetric().to(accelerator.device)
    collected: list[dict[str, np.ndarray]] = []
    for batch in batches:
        real = batch["index"] >= 0  # with several ranks the last batch is filled up with rows of index -1
        if not real.any():
            continue
        batch = {name: value[real].to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        with accelerator.autocast():
            result = task.loss(model, batch)
        task.update(metrics, result["output"], batch)
        mean_loss.update(result["loss"], weight=len(batch["index"]))
        if collect:
            collected.append(
                {name: value.cpu().numpy() for name, value in task.collect(result["output"], batch).items()}
            )
    figures = {"loss": mean_loss.compute().item(), **task.report(metrics)}
    comments = task.comment(metrics)
    model.train(was_training)
    return Evaluation(figures, _join(collected, accelerator) if collect else {}, comments)


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
    source = open_source(config)
    if split not in source.splits:
        raise ValueError(f"split: got {split!r}; {source.name} has {', '.join(source.splits)}")
    source = match_source(source, run.source)
    accelerator = make_accelerator(config.train)
    model = run.model.to(accelerator.device)
    loader = build_loader(source, split, run.source, config, accelerator, train=False)
    return evaluate_split(run.task, model, loader.batches(0, 0, train=False), accelerator, collect=True)


@torch.inference_mode()
def predict(
    run_dir: str | Path,
    paths: Sequence[str | Path],
    *,
    weights: str = "final",
    device: str = "auto",
    batch_size: int = 64,
) -> Iterator[Prediction]:
    """Answer for image files with a trained run, in their order; one that cannot be read gets an `error`.

    Args:
        run_dir: The run folder.
        paths: Image files.
        weights: `final` or `best`.
        device: `auto` or `cpu`.
        batch_size: Images computed at once.
    """
    run = load_run(run_dir, weights)
    run.config.train.device = "cpu" if device == "cpu" else "auto"
    accelerator = make_accelerator(run.config.train)
    model = run.model.to(accelerator.device)
    read = reader(run.source)
    for start in range(0, len(paths), batch_size):
        predictions = [Prediction(str(path)) for path in paths[start : start + batch_size]]
        images: list[Tensor] = []
        readable = []
        for prediction in predictions:
            try:
                images.append(read(prediction.path))
                readable.append(prediction)
            except BadSample as bad:
                prediction.error = bad.reason
        if images:
            with accelerator.autocast():
                output = model(torch.stack(images).to(accelerator.device))
            for prediction, answers in zip(readable, run.task.describe(output), strict=True):
                prediction.answers = answers
        yield from predictions
