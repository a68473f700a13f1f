"""Decoded pictures kept in memory, so that the second epoch of a small set decodes nothing."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from coterie.data.images import BadSample, Header
from coterie.data.source import ImageDataset

logger = logging.getLogger("coterie.data")

LIMIT = 2**30
"""Bytes of decoded pictures that a Loader keeps when it is free to choose."""

_BLOCK = 1024


class CachedImages(ImageDataset):
    """The pictures of another dataset, decoded once. `bad` holds the index of each that cannot be, with its BadSample.

    The targets of a dense set are kept as well. Worker processes that are forked share the memory.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        pictures: list[np.ndarray | None],
        bad: dict[int, BadSample],
        targets: list[Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.labels = dataset.labels
        self.channels = dataset.channels
        self.kind = dataset.kind
        self.pictures = pictures
        self.bad = bad
        self.targets = targets

    def read(self, index: int) -> bytes:
        return self.dataset.read(index)

    def name(self, index: int) -> str:
        return self.dataset.name(index)

    def header(self, index: int) -> Header:
        return self.dataset.header(index)

    def image(self, index: int) -> Image.Image:
        picture = self.pictures[index]
        if picture is None:
            raise self.bad[index]
        return Image.fromarray(picture)

    def target(self, index: int) -> Any:
        if self.targets is None:
            return self.dataset.target(index)
        if self.targets[index] is None:
            raise self.bad[index]
        return self.targets[index]


def decode_all(dataset: ImageDataset, max_bad: int, limit: int | None = None) -> CachedImages | None:
    """Decode every picture of a dataset on all cores.

    Args:
        dataset: what to decode.
        max_bad: stop decoding once more pictures than this are bad; the cache then holds those bad ones and is not
            complete.
        limit: give up (and return None) as soon as the decoded pictures exceed this many bytes.
    """
    start, size = time.monotonic(), 0
    pictures: list[np.ndarray | None] = []
    targets: list[Any] | None = [] if dataset.kind != "class" else None
    bad: dict[int, BadSample] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; what matters raises
        for decoded in _decode(dataset):
            if isinstance(decoded, BadSample):
                bad[len(pictures)] = decoded
                decoded = (None, None)
            size += sum(part.nbytes for part in decoded if isinstance(part, np.ndarray))
            pictures.append(decoded[0])
            if targets is not None:
                targets.append(decoded[1])
            if limit is not None and size > limit:
                return None
            if len(bad) > max_bad:
                break
    logger.info("decoded %d images into memory (%d MiB) in %.1f s", len(pictures), size >> 20, time.monotonic() - start)
    return CachedImages(dataset, pictures, bad, targets)


_Decoded = tuple[np.ndarray | None, Any]


def _decode(dataset: ImageDataset) -> Iterator[_Decoded | BadSample]:
    """Each picture, and its target in a dense set."""

    def decode(index: int) -> _Decoded | BadSample:
        try:
            return np.asarray(dataset.image(index)), dataset.target(index) if dataset.kind != "class" else None
        except BadSample as error:
            return error

    indices = iter(range(len(dataset)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow's decoders let go of the interpreter lock
        while block := list(islice(indices, _BLOCK)):
            yield from pool.map(decode, block)
