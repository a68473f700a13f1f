"""What every reader gives: a `DataSource` of labelled pictures, checked before anything is trained on it.

A reader (digits.py, folder.py, parquet.py, hub.py, webdataset.py) lists pictures and labels, and hands them to
`assemble`, which settles the splits and refuses what could not be trained on: no images, an empty class, a label that
is no class. No reader decodes a picture before it is asked for; `assemble` looks at the headers of a sample of the
training pictures.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from coterie.data.images import BadSample, Header, decode_image, read_header
from coterie.data.randomness import permutation

logger = logging.getLogger("coterie.data")

HOLDOUT_SHARE = 0.1
HEADERS_SAMPLED = 256
STATISTICS_SAMPLED = 1024

_SPLIT_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


TARGETS = ("class", "label_map", "instances")
"""What a picture can be annotated with: the number of its class, a label map, or instances (boxes, masks)."""


class Sample(NamedTuple):
    """One annotated picture: an 8-bit "L" or "RGB" image, its target, its name for people.

    The target `label` is the number of its class, or what `ImageDataset.target` gives in a dense set.
    """

    image: Image.Image
    label: Any
    name: str


class ImageDataset(ABC):
    """Labelled pictures by number. `dataset[i]` is a Sample, or raises BadSample; `labels` is known without decoding.

    Subclasses give `read` and `name`. `channels` (1 or 3) is set when a DataSource is assembled. Datasets whose
    `kind` is another of TARGETS than "class" give `target` as well; their `labels` are -1. `has_masks` says of
    instances that they have masks besides boxes.
    """

    labels: Int64[np.ndarray, " samples"]
    channels: int = 3
    kind: str = "class"
    has_masks: bool = False

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of the picture's file. Raises OSError or BadSample where there are none."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What people call the sample: its path, or file and row."""

    def image(self, index: int) -> Image.Image:
        """The decoded picture. Raises BadSample."""
        try:
            data = self.read(index)
        except OSError as error:
            raise BadSample(self.name(index), error.strerror or str(error)) from error
        return decode_image(data, self.channels, self.name(index))

    def target(self, index: int) -> Any:
        """What the picture is annotated with.

        "class": int; "label_map": uint8 array (height, width); "instances": `coterie.data.annotations.Instances`.

        Raises:
            BadSample: the annotation cannot be read or does not fit the picture.
        """
        return int(self.labels[index])

    def header(self, index: int) -> Header:
        """Size and colour of the picture, without decoding it. Raises BadSample."""
        try:
            data = self.read(index)
        except OSError as error:
            raise BadSample(self.name(index), error.strerror or str(error)) from error
        return read_header(data, self.name(index))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, takes {-len(self)} to {len(self) - 1}")
        index %= len(self)
        return Sample(self.image(index), self.target(index), self.name(index))


class Subset(ImageDataset):
    """Some samples of another dataset, in the order of `indices`."""

    def __init__(self, dataset: ImageDataset, indices: Int64[np.ndarray, " samples"]) -> None:
        self.dataset = dataset
        self.indices = indices
        self.labels = dataset.labels[indices]
        self.kind, self.has_masks = dataset.kind, dataset.has_masks

    @property
    def channels(self) -> int:  # type: ignore[override]
        return self.dataset.channels

    @channels.setter
    def channels(self, channels: int) -> None:
        self.dataset.channels = channels

    def read(self, index: int) -> bytes:
        return self.dataset.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        return self.dataset.name(int(self.indices[index]))

    def image(self, index: int) -> Image.Image:
        return self.dataset.image(int(self.indices[index]))

    def target(self, index: int) -> Any:
        return self.dataset.target(int(self.indices[index]))

    def header(self, index: int) -> Header:
        return self.dataset.header(int(self.indices[index]))


@dataclass(frozen=True)
class DataSource:
    """A set of labelled pictures that is fit to train on.

    Attributes:
        name: short, for titles.
        classes: name of each class; a label is an index into it.
        channels: 1 when every training picture looked at is grey, else 3. All splits decode to it.
        native_size: (height, width) of the pictures; the medians where they differ.
        splits: "train" and "test" always; "validation" as well where the source has both it and a test split.
        mirror: whether a mirrored picture keeps its label (False for digits and letters).
        background: grey value 0 to 255 behind what the pictures show; None where there is no such thing.
        target: what the pictures are annotated with, one of TARGETS.
        has_masks: of instances: whether they have masks besides boxes.
    """

    name: str
    classes: list[str]
    channels: int
    native_size: tuple[int, int]
    splits: dict[str, ImageDataset] = field(repr=False)
    mirror: bool = True
    background: int | None = None
    target: str = "class"
    has_masks: bool = False

    def describe(self) -> str:
        """One line for people."""
        counts = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        height, width = self.native_size
        colour = "grey" if self.channels == 1 else "RGB"
        what = {"label_map": " with label maps", "instances": " with masks" if self.has_masks else " with boxes"}
        pictures = f"{counts} images{what.get(self.target, '')}"
        return f"{self.name}: {len(self.classes)} classes, {pictures}, {width}x{height} {colour}"

    def statistics(self, channels: int | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, pixels from 0 to 1, over a fixed sample of the train split.

        Every picture counts the same, whatever its size. Measured once, then remembered.
        """
        channels = self.channels if channels is None else channels
        if channels not in self._statistics:
            self._statistics[channels] = _measure(self.splits["train"], channels)
        return self._statistics[channels]

    @functools.cached_property
    def _statistics(self) -> dict[int, tuple[tuple[float, ...], tuple[float, ...]]]:
        return {}


def split_of(name: str) -> str | None:
    """The split that a name stands for ("val" is "validation"), or None for a name that means none."""
    return _SPLIT_ALIASES.get(name.lower())


def assemble(
    name: str,
    classes: Sequence[str],
    splits: Mapping[str, ImageDataset],
    *,
    mirror: bool | None = None,
    background: int | None = None,
) -> DataSource:
    """Check what a reader found and make a DataSource of it.

    Args:
        name: the source, as errors call it.
        classes: class names by label.
        splits: "train" and, where the source has them, "validation" and "test". A split without labels (all -1, as is
            the custom for withheld ones) is dropped. Without any other split, a tenth of each class is held out.
        mirror: see DataSource; None decides by the class names: single characters and numbers are not mirrored.
        background: see DataSource.

    Raises:
        ValueError: no images, fewer than two classes, a class without a training image, a label that is no class, or no
            training picture that can be read.
    """
    splits = {key: split for key, split in splits.items() if len(split)}
    if "train" not in splits:
        raise ValueError(f"{name}: no training images")
    if len(classes) < 2:
        raise ValueError(f"{name}: one class only ({', '.join(map(repr, classes))}); takes at least two")
    for key in [key for key in splits if key != "train" and bool((splits[key].labels == -1).all())]:
        logger.warning("%s: the %s split has no labels and is left out", name, key)
        del splits[key]
    for split in splits.values():
        _check_labels(split, classes)
    _check_empty_classes(name, classes, splits["train"])
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    if "test" not in splits:
        kept, held_out = stratified_split(splits["train"].labels, HOLDOUT_SHARE)
        if not len(held_out):
            raise ValueError(f"{name}: {len(kept)} images and no test split: too few to hold any out")
        splits["train"], splits["test"] = Subset(splits["train"], kept), Subset(splits["train"], held_out)
    headers = sample_headers(name, splits["train"])
    channels = 1 if all(header.grey for header in headers) else 3
    for split in splits.values():
        split.channels = channels
    return DataSource(
        name=name,
        classes=list(classes),
        channels=channels,
        native_size=(
            int(np.median([header.height for header in headers])),
            int(np.median([header.width for header in headers])),
        ),
        splits={key: splits[key] for key in ("train", "validation", "test") if key in splits},
        mirror=not all(len(label) == 1 or label.isdecimal() for label in classes) if mirror is None else mirror,
        background=background,
    )


def stratified_split(
    labels: Int64[np.ndarray, " samples"], share: float, seed: int = 0
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held_out"]]:
    """Hold out `share` of every class (rounded; never its last image). The same indices on every machine, ascending."""
    held_out = np.zeros(len(labels), dtype=bool)
    order = permutation(len(labels), seed)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held_out[members[: min(round(share * len(members)), len(members) - 1)]] = True
    if not held_out.any() and len(labels) > len(np.unique(labels)):
        # Classes of fewer than five images round to nothing; one image of the largest class is better than no test.
        classes, sizes = np.unique(labels, return_counts=True)
        held_out[order[labels[order] == classes[sizes.argmax()]][0]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _check_labels(split: ImageDataset, classes: Sequence[str]) -> None:
    wrong = np.flatnonzero((split.labels < 0) | (split.labels >= len(classes)))
    if len(wrong):
        first = int(wrong[0])
        more = f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""
        raise ValueError(
            f"{split.name(first)}: label {split.labels[first]} is none of the {len(classes)} classes, "
            f"takes 0 to {len(classes) - 1}{more}"
        )


def _check_empty_classes(name: str, classes: Sequence[str], train: ImageDataset) -> None:
    counts = np.bincount(train.labels, minlength=len(classes))
    empty = [classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    if empty:
        shown = ", ".join(map(repr, empty[:5])) + (", ..." if len(empty) > 5 else "")
        raise ValueError(f"{name}: {len(empty)} of {len(classes)} classes without a training image: {shown}")


def sample_headers(name: str, train: ImageDataset) -> list[Header]:
    """Headers of a fixed sample of pictures. Raises ValueError when none of them can be read."""
    headers, first_bad = [], None
    for index in permutation(len(train), 0)[:HEADERS_SAMPLED]:
        try:
            headers.append(train.header(int(index)))
        except BadSample as bad:
            first_bad = first_bad or bad
    if not headers:
        raise ValueError(f"{name}: none of the training images looked at can be read, the first: {first_bad}")
    return headers


def _measure(train: ImageDataset, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    levels = np.arange(256) / 255
    total, count = np.zeros((channels, 256)), 0
    for index in permutation(len(train), 1)[:STATISTICS_SAMPLED]:
        try:
            image = train.image(int(index))
        except BadSample:
            continue  # the Loader reports it when its turn comes
        if channels != train.channels:
            image = image.convert("L" if channels == 1 else "RGB")
        total += np.reshape(image.histogram(), (channels, 256)) / (image.width * image.height)
        count += 1
    if not count:
        raise ValueError("none of the training images looked at can be decoded")
    mean = total @ levels / count
    variance = total @ levels**2 / count - mean**2
    # Pictures of a single value have no spread; a floor of one grey level keeps the division sane.
    std = np.sqrt(np.maximum(variance, 0)).clip(min=1 / 255)
    return tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())
