"""Image sets on the Hugging Face hub, by name, through `datasets` and its cache.

A set that is in the cache opens without a network. What `datasets` gives is an Arrow table per split, read as
parquet.py does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coterie.data.parquet import from_tables
from coterie.data.source import DataSource, split_of


def open_hub(name: str, image: str | None = None, label: str | None = None, config: str | None = None) -> DataSource:
    """Open the image set `name` ("cifar10", "owner/name") of the hub.

    Args:
        name: the set.
        image, label: names of the columns; needed only where the set leaves a choice ("fine_label" of cifar100).
        config: the set's configuration, where it has several.

    Raises:
        ValueError: the set cannot be had (no network and not in the cache, no such set, a script) or is no labelled
            image set.
    """
    shown, loaded = load_from_hub(name, config)
    tables, origins = {}, {}
    for key, split in loaded.items():
        meaning = split_of(str(key))
        if meaning is None:
            continue
        if meaning in tables:
            raise ValueError(f"{shown}: two of its splits mean {meaning}: {', '.join(map(str, loaded))}")
        table = split.flatten_indices().data.table
        tables[meaning] = table.replace_schema_metadata(split.features.arrow_schema.metadata)
        origins[meaning] = {f"{shown} {key}": 0}
    if "train" not in tables:
        raise ValueError(f"{shown}: no train split; its splits are {', '.join(map(str, loaded))}")
    return from_tables(name, tables, origins, Path(), image, label)


def load_from_hub(name: str, config: str | None) -> tuple[str, Any]:
    """The set as errors call it, and its splits (a DatasetDict). Raises ValueError if it cannot be had."""
    import datasets

    shown = f"hf:{name}"
    try:
        return shown, datasets.load_dataset(name, config)
    except Exception as error:  # network, hub, cache and builder each raise errors of their own libraries
        first_line = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{shown}: cannot be loaded: {type(error).__name__}: {first_line}"
            " (without a network only sets in the cache of `datasets` open)"
        ) from error
