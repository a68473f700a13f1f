"""Between a run's configuration and `coterie.data`: sources, transforms and loaders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from coterie.data import BadSample, DataSource, Loader, build_pipeline, match_classes, open_data
from coterie.data.images import read_image
from coterie.data.packing import TokenLoader
from coterie.data.text import TextSource, open_text
from coterie.data.tokenizers import TextTokenizer
from coterie.data.transforms import settle
from coterie.engine.config import RunConfig, settled
from coterie.engine.runs import SourceInfo
from coterie.tasks import Batch, task_class

if TYPE_CHECKING:
    from accelerate import Accelerator

MONITORED = "validation"
TEXT = "text"  # the target of a source of text
WHOLE = "class"  # the target of a source with one label for each picture
LARGEST_BY_DEFAULT = 224
SMALL = 64
SMALL_DENSE = 192


def open_source(config: RunConfig, tokenizer: TextTokenizer | None = None) -> DataSource | TextSource:
    """Open the data of a run, with the targets that its task needs. Raises as `open_data` and `open_text` do.

    Args:
        config: Of the run.
        tokenizer: Of text, where there is one already.
    """
    task = task_class(config.task.name)
    spec = settled(config.data.source, "data.source")
    if task.target == TEXT:
        return open_text(spec, config.text, tokenizer)
    source = open_data(
        spec,
        target=task.target,
        image_size=config.transform.image_size,
        max_bad_share=config.data.max_bad_share,
    )
    if task.masks and not source.has_masks:
        raise ValueError(f"{source.name} has boxes only and {config.task.name} needs masks; train a detector of boxes")
    return source


def settle_config(config: RunConfig, source: DataSource | TextSource) -> RunConfig:
    """Fill in what depends on the data: for pictures their size and a model that suits it.

    Pictures with one label each keep their own size up to 224 x 224; for dense targets the transforms know better.
    """
    transform, model = config.transform, config.model
    if isinstance(source, TextSource):
        return dataclasses.replace(config, model=dataclasses.replace(model, name=model.name or "dcformer"))
    if source.target == WHOLE and transform.image_size is None and max(source.native_size) > LARGEST_BY_DEFAULT:
        transform = dataclasses.replace(transform, image_size=LARGEST_BY_DEFAULT)
    if model.name is None:
        size = transform.image_size or source.native_size
        longest = max(size if isinstance(size, tuple) else (size,))
        if source.target != WHOLE and longest <= SMALL_DENSE:
            # Maps of strides 4 to 32, as larger networks have them: finer ones make decoders and heads slow.
            model = dataclasses.replace(model, name="dgt_pico", options={"stem_stride": 2, **model.options})
        else:
            model = dataclasses.replace(model, name="dgt_nano" if longest <= SMALL else "dgt_tiny")
    return dataclasses.replace(config, transform=transform, model=model)


def source_info(source: DataSource | TextSource, config: RunConfig) -> SourceInfo:
    """What the run remembers of its data, with everything settled that the configuration left open."""
    if isinstance(source, TextSource):
        return SourceInfo(source.name, [], config.transform, TEXT, source.facts, source.tokenizer)
    return SourceInfo(source.name, list(source.classes), settle(source, config.transform), source.target)


def monitored_split(source: DataSource | TextSource) -> str:
    """The split that is evaluated while training: validation where there is one, else test."""
    return MONITORED if MONITORED in source.splits else "test"


def build_loader(
    source: DataSource | TextSource,
    split: str,
    info: SourceInfo,
    config: RunConfig,
    accelerator: Accelerator | None = None,
    *,
    train: bool = True,
) -> Loader | TokenLoader:
    """The loader of this rank's share of one split (of all of it, without an accelerator); `train` augments."""
    if isinstance(source, TextSource):
        facts = info.text
        assert facts is not None
        return TokenLoader(
            source.splits[split],
            facts.sequence_length,
            end=facts.end if facts.separate else None,
            batch_size=settled(config.train.batch_size, "train.batch_size"),
            seed=config.train.seed,
            rank=accelerator.process_index if accelerator else 0,
            world_size=accelerator.num_processes if accelerator else 1,
            stride=facts.eval_stride,
        )
    return Loader(
        source.splits[split],
        build_pipeline(None, info.transform, info.target, train, masks=task_class(config.task.name).masks),
        batch_size=settled(config.train.batch_size, "train.batch_size"),
        seed=config.train.seed,
        rank=accelerator.process_index if accelerator else 0,
        world_size=accelerator.num_processes if accelerator else 1,
        workers=config.data.workers if accelerator else 0,
        cache="auto" if accelerator else False,
        max_bad_share=config.data.max_bad_share,
        pin_memory=accelerator is not None and accelerator.device.type == "cuda",
    )


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
        batch: Batch = self._pipeline.collate([self._pipeline(image, None) for image in images])
        return {**batch, "index": torch.arange(len(images))}


__all__ = [
    "BadSample",
    "Reader",
    "build_loader",
    "match_classes",
    "monitored_split",
    "open_source",
    "settle_config",
    "source_info",
]
