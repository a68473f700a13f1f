"""Between a run's configuration and `coterie.data`: sources, transforms and loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from coterie.data import BadSample, DataSource, ImageDataset, Loader
from coterie.data.images import read_image
from coterie.data.transforms import settle
from coterie.engine._interim import batch_of, build_pipeline, open_data, task_class
from coterie.engine.config import RunConfig, settled
from coterie.engine.runs import SourceInfo
from coterie.tasks import Batch

if TYPE_CHECKING:
    from accelerate import Accelerator

MONITORED = "validation"
WHOLE = "class"  # the target of a source with one label for each picture
LARGEST_BY_DEFAULT = 224
SMALL = 64


def open_source(config: RunConfig) -> DataSource:
    """Open the data of a run, with the targets that its task needs. Raises as `open_data` does."""
    target = task_class(config.task.name).target
    return open_data(config.data.source, target=target, image_size=config.transform.image_size)


def settle_config(config: RunConfig, source: DataSource) -> RunConfig:
    """Fill in what depends on the pictures: their size and a model that suits it.

    Pictures with one label each keep their own size up to 224 x 224; for dense targets the transforms know better.
    """
    transform, model = config.transform, config.model
    if (
        getattr(source, "target", "class") == WHOLE
        and transform.image_size is None
        and max(source.native_size) > LARGEST_BY_DEFAULT
    ):
        transform = dataclasses.replace(transform, image_size=LARGEST_BY_DEFAULT)
    if model.name is None:
        size = transform.image_size or source.native_size
        small = max(size if isinstance(size, tuple) else (size,)) <= SMALL
        model = dataclasses.replace(model, name="dgt_nano" if small else "dgt_tiny")
    return dataclasses.replace(config, transform=transform, model=model)


def source_info(source: DataSource, config: RunConfig) -> SourceInfo:
    """What the run remembers of its data, with everything settled that the configuration left open."""
    return SourceInfo(
        source.name, list(source.classes), settle(source, config.transform), getattr(source, "target", "class")
    )


def monitored_split(source: DataSource) -> str:
    """The split that is evaluated while training: validation where there is one, else test."""
    return MONITORED if MONITORED in source.splits else "test"


def build_loader(
    source: DataSource,
    split: str,
    info: SourceInfo,
    config: RunConfig,
    accelerator: Accelerator | None = None,
    *,
    train: bool = True,
) -> Loader:
    """The loader of this rank's share of one split (of all of it, without an accelerator); `train` augments."""
    return Loader(
        source.splits[split],
        build_pipeline(None, info.transform, info.target, train),
        batch_size=settled(config.train.batch_size, "train.batch_size"),
        seed=config.train.seed,
        rank=accelerator.process_index if accelerator else 0,
        world_size=accelerator.num_processes if accelerator else 1,
        workers=config.data.workers if accelerator else 0,
        cache="auto" if accelerator else False,
        max_bad_share=config.data.max_bad_share,
        pin_memory=accelerator is not None and accelerator.device.type == "cuda",
    )


def match_source(source: DataSource, info: SourceInfo) -> DataSource:
    """`source` with its labels renumbered so that class names stand for what they stand for in the run.

    Raises:
        ValueError: a class that the run does not know.
    """
    unknown = [name for name in source.classes if name not in info.classes]
    if unknown:
        raise ValueError(
            f"{source.name} has classes that the run was not trained on: {_some(unknown)}; "
            f"it knows {_some(info.classes)}"
        )
    if list(source.classes) == info.classes:
        return source
    numbers = np.array([info.classes.index(name) for name in source.classes])
    splits: dict[str, ImageDataset] = {name: _Renumbered(split, numbers) for name, split in source.splits.items()}
    return dataclasses.replace(source, classes=list(info.classes), splits=splits)


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


class _Renumbered(ImageDataset):
    """A dataset with other numbers for its classes."""

    def __init__(self, dataset: ImageDataset, numbers: np.ndarray) -> None:
        self.dataset, self.channels, self.numbers = dataset, dataset.channels, numbers
        self.labels = numbers[dataset.labels]

    def read(self, index: int) -> bytes:
        return self.dataset.read(index)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def image(self, index: int) -> Image.Image:
        return self.dataset.image(index)


class Reader:
    """Picture files to batches as a model of the run takes them, without a target."""

    def __init__(self, info: SourceInfo) -> None:
        self._channels = info.channels
        self._pipeline = build_pipeline(None, info.transform, info.target, train=False)

    def image(self, path: str) -> Image.Image:
        """The decoded picture. Raises BadSample as `read_image` does."""
        return read_image(path, self._channels)

    def batch(self, images: Sequence[Image.Image]) -> Batch:
        """The batch that the pipeline of evaluation makes of `images`."""
        batch = batch_of(self._pipeline, list(images))
        return {**batch, "index": torch.arange(len(images))}


__all__ = [
    "BadSample",
    "Reader",
    "build_loader",
    "match_source",
    "monitored_split",
    "open_source",
    "settle_config",
    "source_info",
]
