"""A set read with the class numbers of another, so that a model trained on one is evaluated on the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from coterie.data.annotations import IGNORE
from coterie.data.images import Header
from coterie.data.source import DataSource, ImageDataset


def match_classes(source: DataSource, classes: Sequence[str]) -> DataSource:
    """`source` with its labels renumbered, so that class names stand for what they stand for in `classes`.

    Raises:
        ValueError: a class that is not among `classes`.
    """
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise ValueError(
            f"{source.name} has classes that the run was not trained on: {_some(unknown)}; it knows {_some(classes)}"
        )
    if list(source.classes) == list(classes):
        return source
    numbers = np.array([list(classes).index(name) for name in source.classes])
    splits: dict[str, ImageDataset] = {name: Renumbered(split, numbers) for name, split in source.splits.items()}
    return dataclasses.replace(source, classes=list(classes), splits=splits)


class Renumbered(ImageDataset):
    """A dataset with other numbers for its classes: `numbers` holds the new one of each."""

    def __init__(self, dataset: ImageDataset, numbers: np.ndarray) -> None:
        self.dataset, self.channels, self.kind = dataset, dataset.channels, dataset.kind
        self.has_masks = dataset.has_masks
        self.numbers = numbers
        self.labels = numbers[dataset.labels] if dataset.kind == "class" else dataset.labels

    def read(self, index: int) -> bytes:
        return self.dataset.read(index)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def image(self, index: int) -> Image.Image:
        return self.dataset.image(index)

    def header(self, index: int) -> Header:
        return self.dataset.header(index)

    def target(self, index: int) -> Any:
        target = self.dataset.target(index)
        if self.kind == "class":
            return int(self.labels[index])
        if self.kind == "instances":
            return dataclasses.replace(target, labels=self.numbers[target.labels])
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[: len(self.numbers)] = self.numbers
        return table[target]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
