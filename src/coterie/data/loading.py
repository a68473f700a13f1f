"""Batches whose content is a function of (seed, epoch, index) and of nothing else.

    epoch e        the order of training is a permutation that is a function of (seed, e)
    sample i       its augmentation is drawn from generators seeded by (seed, e, i)
    rank r of W    takes the r-th slice of every global batch
    batch b        can be the first one: an epoch that was interrupted goes on where it stopped

So the number of workers, the number of ranks and an interruption change nothing in what the model sees. The global
random generators are left as they were found: a loader never disturbs the dropout of the model beside it.

A picture that cannot be read is skipped, reported with its path and counted. In training the next good one of the
dataset takes its place; in evaluation it is left out. Past a stated share of bad ones the run stops
(TooManyBadSamples).
"""

from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coterie.data.annotations import BadAnnotation
from coterie.data.cache import LIMIT, CachedImages, decode_all
from coterie.data.images import BadSample
from coterie.data.pipelines import PADDING, Batch, ClassPipeline, Pipeline, Row
from coterie.data.randomness import hash_key, permutation, preserved_generators, seed_everything
from coterie.data.source import ImageDataset

logger = logging.getLogger("coterie.data")

_REPORTED = 20


class TooManyBadSamples(ValueError):
    """More pictures of a dataset cannot be read than the loader was told to put up with."""


class _Order(NamedTuple):
    """What a worker is asked for: one rank's slice of one batch."""

    epoch: int
    indices: tuple[int, ...]
    train: bool


class _Delivery(NamedTuple):
    """What a worker gives back. `batch` is None when no row could be filled."""

    batch: Batch | None
    bad: list[tuple[str, str]]


class _Batcher(Dataset[_Delivery]):
    """Makes batches, in this process or in a worker."""

    def __init__(
        self,
        dataset: ImageDataset,
        pipeline: Pipeline,
        seed: int,
        max_bad: int,
        equal_rows: bool,
    ) -> None:
        self.dataset = dataset
        self.pipeline = pipeline
        self.seed = seed
        self.max_bad = max_bad
        self.equal_rows = equal_rows
        self.known_bad: dict[int, BadSample] = {}

    def __getitem__(self, order: _Order) -> _Delivery:
        bad: dict[str, str] = {}
        rows: list[Row | None] = []
        indices: list[int] = []
        seeds = hash_key(self.seed, order.epoch, np.array(order.indices, dtype=np.int64)).tolist()
        with preserved_generators(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata, every epoch; what matters raises
            for index, seed in zip(order.indices, seeds, strict=True):
                used, row = self._find(index, seed, order.train, bad)
                indices.append(used)
                rows.append(row)
            if order.train and PADDING in indices:
                return _Delivery(None, list(bad.items()))  # too many bad ones; the loader stops when it hears of them
            if not self.equal_rows:
                rows = [row for row in rows if row is not None]
                indices = [index for index in indices if index != PADDING]
            return _Delivery(self._collate(rows, indices), list(bad.items()))

    def _find(self, index: int, seed: int, replace: bool, bad: dict[str, str]) -> tuple[int, Row | None]:
        """The row of `index`, or of the next good sample after it. Adds those that cannot be used to `bad`."""
        if index == PADDING:
            return PADDING, None
        for step in range(len(self.dataset) if replace else 1):
            candidate = (index + step) % len(self.dataset)
            try:
                return candidate, self._row(candidate, seed)
            except BadSample as error:
                self.known_bad[candidate] = error
                bad[error.name] = error.reason
            if len(self.known_bad) > self.max_bad:
                break
        return PADDING, None

    def _row(self, index: int, seed: int) -> Row:
        if index in self.known_bad:
            raise self.known_bad[index]
        image, target = self.dataset.image(index), self.dataset.target(index)
        seed_everything(seed)
        try:
            return self.pipeline(image, target)
        except BadAnnotation as error:
            raise BadSample(self.dataset.name(index), str(error)) from error

    def _collate(self, rows: list[Row | None], indices: list[int]) -> Batch | None:
        if not rows:
            return None
        example = next((row for row in rows if row is not None), None)
        if example is None:  # a slice of nothing but padding still has the shape of its neighbours
            example = self._find(0, 0, True, {})[1]
        if example is None:
            return None
        blank = self.pipeline.blank(example)
        batch = self.pipeline.collate([blank if row is None else row for row in rows])
        return {**batch, "index": torch.tensor(indices, dtype=torch.int64)}


class _Orders:
    """The sampler of the worker pool: yields whatever orders were last put in."""

    def __init__(self) -> None:
        self.orders: list[_Order] = []

    def __iter__(self) -> Iterator[_Order]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)


class Loader:
    """Batches of one dataset.

    Args:
        dataset: annotated pictures.
        transform: what is done with them: a Pipeline, see `coterie.data.pipelines.build_pipeline`; or, for
            classification, a function of a picture to a tensor (channels, height, width), the same shape for all.
        batch_size: images in a GLOBAL batch, over all ranks.
        seed: of order and augmentation.
        rank, world_size: which slice of each global batch this process gets.
        workers: processes that prepare batches; 0 prepares them in this one. They live until `close`.
        cache: keep decoded pictures in memory; "auto" when they fit in 1 GiB over all ranks.
        max_bad_share: share of the dataset's pictures that may be bad; one always may (unless this is 0), never all.
        pin_memory: put batches in page-locked memory, for a faster way to a GPU.

    Attributes:
        bad: reason by name of each picture that could not be read so far. With several ranks and no cache each rank
            knows those it met.

    Raises:
        ValueError: an argument out of its range, or a batch that the ranks cannot share equally.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Pipeline | Callable[[Image.Image], Tensor],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        cache: bool | str = "auto",
        max_bad_share: float = 0.01,
        pin_memory: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset: got no images, takes at least one")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank} of world_size {world_size}, takes 0 <= rank < world_size")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: got {batch_size}, takes a positive multiple of the {world_size} ranks")
        if workers < 0:
            raise ValueError(f"workers: got {workers}, takes 0 or more")
        if cache not in (True, False, "auto"):
            raise ValueError(f"cache: got {cache!r}, takes true, false or 'auto'")
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share: got {max_bad_share}, takes a share from 0 to 1")
        self.dataset = dataset
        self.pipeline = transform if isinstance(transform, Pipeline) else ClassPipeline(transform)
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.max_bad_share = max_bad_share
        self.pin_memory = pin_memory
        self.bad: dict[str, str] = {}
        self._cache = cache
        self._met = np.zeros(len(dataset), dtype=bool)
        self._batcher: _Batcher | None = None
        self._pool: DataLoader[_Delivery] | None = None
        self._orders = _Orders()
        self._turn = 0

    def num_batches(self, train: bool = True) -> int:
        """Batches in an epoch. Training drops an incomplete last one; a set smaller than a batch is repeated."""
        if train:
            return max(len(self.dataset) // self.batch_size, 1)
        return math.ceil(len(self.dataset) / self.batch_size)

    def batches(self, epoch: int, start_batch: int = 0, train: bool = True) -> Iterator[Batch]:
        """This rank's slices of the batches of an epoch, from `start_batch` on.

        Training shuffles and gives full batches only. Evaluation keeps the dataset's order and shows every picture
        once; with several ranks every rank gets the same number of rows, filled up with rows of index and label -1
        and zero pixels, which are to be dropped after gathering.

        Yields:
            what the pipeline makes of the rows, and "index", int64 (batch,): that of the picture shown, in the
            dataset. Of classification: {"image": float32 (batch, channels, height, width), "label": int64 (batch,),
            "index": int64 (batch,)}.

        Raises:
            ValueError: `start_batch` is beyond the epoch.
            TooManyBadSamples: more pictures are bad than `max_bad_share` allows.
            RuntimeError: another iteration over the same workers began before this one ended.
        """
        total = self.num_batches(train)
        if not 0 <= start_batch <= total:
            raise ValueError(f"start_batch: got {start_batch}, takes 0 to {total}, the batches of an epoch")
        order = self._epoch_order(epoch, train)
        slices = [self._slice(order, batch) for batch in range(start_batch, total)]
        return self._deliver([_Order(epoch, tuple(part.tolist()), train) for part in slices])

    def close(self) -> None:
        """End the worker processes. The loader can be used again; it then starts new ones."""
        self._pool = None
        self._turn += 1

    def _epoch_order(self, epoch: int, train: bool) -> Int64[np.ndarray, " rows"]:
        """Dataset indices in the order of an epoch: whole batches (training), or padded for the ranks (evaluation)."""
        length = len(self.dataset)
        if train:
            return np.resize(permutation(length, self.seed, epoch), self.num_batches() * self.batch_size)
        padding = -length % self.world_size
        return np.concatenate([np.arange(length), np.full(padding, PADDING)])

    def _slice(self, order: Int64[np.ndarray, " rows"], batch: int) -> Int64[np.ndarray, " slice"]:
        whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        share = len(whole) // self.world_size
        return whole[self.rank * share : (self.rank + 1) * share]

    def _deliver(self, orders: list[_Order]) -> Iterator[Batch]:
        if self._batcher is None:
            self._batcher = self._prepare()
        batcher = self._batcher
        deliveries = self._from_workers(batcher, orders) if self.workers else map(batcher.__getitem__, orders)
        for order, delivery in zip(orders, deliveries, strict=True):
            self._met[[index for index in order.indices if index != PADDING]] = True
            self._note(delivery.bad, hopeless=order.train and delivery.batch is None)
            if delivery.batch is None:
                continue
            if self.pin_memory and not self.workers:
                yield _pinned(delivery.batch)
            else:
                yield delivery.batch

    def _prepare(self) -> _Batcher:
        dataset = self.dataset
        max_bad = self._allowed(len(dataset))
        if cached := self._fill_cache(max_bad):
            self._met[:] = True
            self._note([(error.name, error.reason) for error in cached.bad.values()])
            dataset = cached
        return _Batcher(dataset, self.pipeline, self.seed, max_bad, equal_rows=self.world_size > 1)

    def _fill_cache(self, max_bad: int) -> CachedImages | None:
        if self._cache == "auto":
            return decode_all(self.dataset, max_bad, LIMIT // self.world_size) if self._seems_to_fit() else None
        return decode_all(self.dataset, max_bad) if self._cache else None

    def _seems_to_fit(self) -> bool:
        """Whether a few headers promise that the decoded set fits; spares decoding a gigabyte in vain."""
        sizes = []
        layers = self.dataset.channels + (self.dataset.kind == "label_map")
        for index in permutation(len(self.dataset), 2)[:64]:
            try:
                header = self.dataset.header(int(index))
            except BadSample:
                continue
            sizes.append(header.height * header.width * layers)
        return bool(sizes) and float(np.mean(sizes)) * len(self.dataset) <= LIMIT // self.world_size

    def _from_workers(self, batcher: _Batcher, orders: list[_Order]) -> Iterator[_Delivery]:
        if self._pool is None:
            self._pool = DataLoader(
                batcher,
                batch_size=None,
                sampler=self._orders,
                num_workers=self.workers,
                persistent_workers=True,
                pin_memory=self.pin_memory,
                collate_fn=_unchanged,
                # A generator of its own: the pool would draw from the global one, and disturb the model's dropout.
                generator=torch.Generator(),
                # Forked workers share the cache and the tables of parquet instead of copying them.
                multiprocessing_context=multiprocessing.get_context("fork") if sys.platform == "linux" else None,
            )
        self._turn += 1
        turn = self._turn
        self._orders.orders = orders
        iterator = iter(self._pool)
        for _ in orders:
            if turn != self._turn:
                raise RuntimeError(
                    "a new iteration over the same Loader began, or it was closed, before this one ended"
                )
            yield next(iterator)

    def _allowed(self, count: int) -> int:
        if self.max_bad_share == 0:
            return 0
        # One may always be bad, and one has to be good.
        return min(max(math.floor(self.max_bad_share * count + 1e-9), 1), count - 1)

    def _note(self, bad: list[tuple[str, str]], hopeless: bool = False) -> None:
        """Report and count bad samples; raise when they are too many, or a worker found no good one (`hopeless`)."""
        for name, reason in bad:
            if name in self.bad:
                continue
            self.bad[name] = reason
            if len(self.bad) <= _REPORTED:
                logger.warning("skipped %s: %s", name, reason)
            elif len(self.bad) == _REPORTED + 1:
                logger.warning("more images are bad; from now on they are only counted")
        # A rank without a cache meets only its slices at first, so its share is taken of those.
        count = max(int(self._met.sum()), len(self.dataset) // self.world_size)
        if len(self.bad) > self._allowed(count) or hopeless:
            shown = "; ".join(f"{name}: {reason}" for name, reason in itertools.islice(self.bad.items(), 3))
            raise TooManyBadSamples(
                f"{len(self.bad)} of {count} images cannot be read, more than the share of "
                f"{self.max_bad_share:g} that max_bad_share allows: {shown}" + ("; ..." if len(self.bad) > 3 else "")
            )


def _pinned(part: Any) -> Any:
    """Tensors anywhere in a batch, put in page-locked memory."""
    if isinstance(part, Tensor):
        return part.pin_memory()
    if isinstance(part, dict):
        return {key: _pinned(value) for key, value in part.items()}
    return [_pinned(value) for value in part] if isinstance(part, list) else part


def _unchanged(delivery: Any) -> Any:
    return delivery
