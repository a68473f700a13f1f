"""Between a run's configuration and `coterie.data`: sources, transforms and loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from coterie.data import BadSample, DataSource, ImageDataset, Loader, build_transforms, open_data
from coterie.data.images import read_image
from coterie.data.transforms import settle
from coterie.engine.config import RunConfig
from coterie.engine.runs import SourceInfo

if TYPE_CHECKING:
    from accelerate import Accelerator

MONITORED = "validation"
LARGEST_BY_DEFAULT = 224
SMALL = 64


def open_source(config: RunConfig) -> DataSource:
    """Open the data of a run. Raises as `open_data` does."""
    return open_data(config.data.source, image_size=config.transform.image_size)


def settle_config(config: RunConfig, source: DataSource) -> RunConfig:
    """Fill in what depends on the pictures: their size (their own, at most 224 x 224) and a model that suits it."""
    transform, model = config.transform, config.model
    if transform.image_size is None and max(source.native_size) > LARGEST_BY_DEFAULT:
        transform = dataclasses.replace(transform, image_size=LARGEST_BY_DEFAULT)
    if model.name is None:
        size = transform.image_size or source.native_size
        small = max(size if isinstance(size, tuple) else (size,)) <= SMALL
        model = dataclasses.replace(model, name="dgt_nano" if small else "dgt_tiny")
    return dataclasses.replace(config, transform=transform, model=model)


def source_info(source: DataSource, config: RunConfig) -> SourceInfo:
    """What the run remembers of its data, with everything settled that the configuration left open."""
    return SourceInfo(source.name, list(source.classes), settle(source, config.transform))


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
        build_transforms(None, info.transform, train),
        batch_size=config.train.batch_size,
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
        self.dataset, self.channels = dataset, dataset.channels
        self.labels = numbers[dataset.labels]

    def read(self, index: int) -> bytes:
        return self.dataset.read(index)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def image(self, index: int) -> Image.Image:
        return self.dataset.image(index)


def reader(info: SourceInfo) -> Callable[[str], Tensor]:
    """A function from a picture's path to the tensor that the model takes; raises BadSample as `read_image` does."""
    transform = build_transforms(None, info.transform, train=False)
    return lambda path: transform(read_image(path, info.channels))


__all__ = ["BadSample", "build_loader", "match_source", "monitored_split", "open_source", "reader", "source_info"]
