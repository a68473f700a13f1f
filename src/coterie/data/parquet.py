"""Parquet files as Hugging Face `datasets` writes them, read without a network.

An image column is a struct of `bytes` and `path` (or plain binary); the label column is an integer whose class names
stand in the schema's metadata under the key "huggingface" (a ClassLabel), or an integer or string without metadata.
The split of a file is told by its name or folder ("train-00000-of-00004.parquet", "data/test.parquet",
"validation/0000.parquet").

Rows are needed in random order, so the encoded pictures are held in memory; sets larger than `MEMORY_LIMIT` are
turned once into a memory-mapped Arrow file by `datasets`, in its own cache.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data.images import BadSample, printable
from coterie.data.source import DataSource, ImageDataset, assemble, split_of

if TYPE_CHECKING:
    import pyarrow

MEMORY_LIMIT = 4 * 2**30
"""Bytes of encoded pictures that are held in memory."""


class ArrowImages(ImageDataset):
    """Pictures in a column of an Arrow table.

    Args:
        images: the column: struct of bytes and path, or binary.
        labels: (samples,) class numbers.
        origins: names of the files the rows come from, and the number of the first row of each.
        folder: where relative paths of pictures outside the table start.
    """

    def __init__(
        self, images: pyarrow.ChunkedArray, labels: np.ndarray, origins: Mapping[str, int], folder: Path
    ) -> None:
        self.images = images
        self.labels = labels
        self.folder = folder
        self.origin_names = list(origins)
        self.origin_starts = np.array(list(origins.values()))
        # Looking a row up through the chunked column walks over all chunks; there may be thousands.
        self.chunk_starts = np.cumsum([0] + [len(chunk) for chunk in images.chunks[:-1]])

    def _cell(self, index: int) -> tuple[bytes | None, str | None]:
        chunk = int(np.searchsorted(self.chunk_starts, index, side="right")) - 1
        value = self.images.chunk(chunk)[index - int(self.chunk_starts[chunk])].as_py()
        if isinstance(value, dict):
            return value.get("bytes"), value.get("path")
        return value, None

    def read(self, index: int) -> bytes:
        data, path = self._cell(index)
        if data is not None:
            return data
        if path is None:
            raise BadSample(self.name(index), "the row holds no picture")
        return (self.folder / path).read_bytes()

    def name(self, index: int) -> str:
        origin = int(np.searchsorted(self.origin_starts, index, side="right")) - 1
        path = self._cell(index)[1]
        row = f"{self.origin_names[origin]} row {index - int(self.origin_starts[origin])}"
        return f"{row} ({printable(path)})" if path else row


def open_parquet(path: str, image: str | None = None, label: str | None = None) -> DataSource:
    """Open one parquet file or a folder of them.

    Args:
        path: the file or folder.
        image, label: names of the columns; needed only where the schema leaves a choice.

    Raises:
        FileNotFoundError: no such file, or no parquet file in the folder.
        ValueError: a file cannot be read, its split cannot be told, or a column is missing or ambiguous.
    """
    name, folder, tables, origins = open_tables(
        path, lambda where, schema: list(choose_columns(where, schema, image, label))
    )
    return from_tables(name, tables, origins, folder, image, label)


def open_tables(
    path: str, choose: Callable[[str, pyarrow.Schema], list[str]]
) -> tuple[str, Path, dict[str, pyarrow.Table], dict[str, dict[str, int]]]:
    """Read one parquet file or a folder of them.

    Args:
        path: the file or folder.
        choose: the columns to read, in the order wanted, from the name of a file and its schema.

    Returns:
        the name of the set, the folder, a table for each split, and its origins (see ArrowImages).

    Raises:
        FileNotFoundError, ValueError: as `open_parquet`.
    """
    import pyarrow
    import pyarrow.parquet

    root = Path(path).expanduser()
    shown = f"parquet:{printable(root)}"
    if root.is_dir():
        files = sorted(file for file in root.rglob("*.parquet") if not file.name.startswith("."))
        if not files:
            raise FileNotFoundError(f"{shown}: no .parquet file in the folder")
    elif root.is_file():
        files = [root]
    else:
        raise FileNotFoundError(f"{shown}: no such file or folder")

    tables: dict[str, pyarrow.Table] = {}
    origins: dict[str, dict[str, int]] = {}
    for split, members in _by_split(files, root).items():
        try:
            schema = pyarrow.parquet.read_schema(members[0])
            columns = choose(f"{printable(members[0])}", schema)
            counts = [pyarrow.parquet.read_metadata(member).num_rows for member in members]
            tables[split] = _read(members, columns).select(columns)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{shown}: the {split} split cannot be read: {' '.join(str(error).split())}") from error
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        origins[split] = dict(zip((printable(member) for member in members), starts, strict=True))
    name = root.resolve().stem
    if "train" not in tables:
        raise ValueError(f"{name}: no training images, only the split {', '.join(tables)}")
    return name, root if root.is_dir() else root.parent, tables, origins


def from_tables(
    name: str,
    tables: Mapping[str, pyarrow.Table],
    origins: Mapping[str, Mapping[str, int]],
    folder: Path,
    image: str | None = None,
    label: str | None = None,
) -> DataSource:
    """Make a DataSource of one Arrow table per split (see ArrowImages for `origins` and `folder`)."""
    if "train" not in tables:
        raise ValueError(f"{name}: no training images, only the split {', '.join(tables)}")
    classes: list[str] = []
    datasets: dict[str, ImageDataset] = {}
    for split in sorted(tables, key=lambda split: split != "train"):
        table = tables[split]
        image_column, label_column = choose_columns(f"{name} ({split})", table.schema, image, label)
        names = features_of(table.schema).get(label_column, {}).get("names")
        where = f"{name}: column {label_column!r} of the {split} split"
        labels, found = _labels(where, table.column(label_column), names, classes if split != "train" else None)
        if split == "train":
            classes = found
        elif names is not None and list(names) != classes:
            odd = sorted(set(names) ^ set(classes))
            raise ValueError(f"{where}: its classes are not those of the train split" + (f": {odd[:5]}" if odd else ""))
        datasets[split] = ArrowImages(table.column(image_column), labels, origins[split], folder)
    return assemble(name, classes, datasets)


def choose_columns(where: str, schema: pyarrow.Schema, image: str | None, label: str | None) -> tuple[str, str]:
    """Names of the image and the label column. Raises ValueError where one is missing or there is a choice."""
    features = features_of(schema)
    images = image_columns(schema)
    labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    if not labels:
        labels = [name for name in schema.names if name in _USUAL["label"] and name not in images]
    return choose_column(where, "image", image, images, schema), choose_column(where, "label", label, labels, schema)


def image_columns(schema: pyarrow.Schema) -> list[str]:
    """Names of the columns that hold pictures."""
    import pyarrow

    features = features_of(schema)

    def is_image(field: pyarrow.Field) -> bool:
        if field.name in features:
            return features[field.name].get("_type") == "Image"
        kind = field.type
        if pyarrow.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    return [field.name for field in schema if is_image(field)]


_USUAL = {"image": ("image", "img"), "label": ("label", "labels")}


def choose_column(where: str, kind: str, asked: str | None, candidates: Sequence[str], schema: pyarrow.Schema) -> str:
    """The column asked for, or the only or usual one of the candidates. Raises ValueError where there is none."""
    columns = ", ".join(schema.names)
    if asked is not None:
        if asked not in schema.names:
            raise ValueError(f"{where}: no {kind} column {asked!r}; the columns are {columns}")
        return asked
    for name in _USUAL[kind]:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    found = f"several {kind} columns ({', '.join(candidates)})" if candidates else f"no {kind} column found"
    raise ValueError(f"{where}: {found}; the columns are {columns}: name one by adding ?{kind}=COLUMN to the path")


def _by_split(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """Files by split; all "train" when no name tells of a split."""
    by_split: dict[str | None, list[Path]] = {}
    for file in files:
        relative = file.relative_to(root) if root.is_dir() else Path(file.name)
        words = [word for part in relative.with_suffix("").parts for word in re.split(r"[-_. ]", part)]
        split = next((split for word in words if (split := split_of(re.sub(r"\d+$", "", word)))), None)
        by_split.setdefault(split, []).append(file)
    unknown = by_split.pop(None, [])
    if unknown and by_split:
        raise ValueError(f"{printable(unknown[0])}: the name tells no split, unlike that of other files in the folder")
    if root.is_file():
        return {"train": list(files)}
    return {"train": unknown} if unknown else {str(split): members for split, members in by_split.items()}


def _read(files: Sequence[Path], columns: list[str]) -> pyarrow.Table:
    import pyarrow
    import pyarrow.parquet

    size = 0
    for file in files:
        metadata = pyarrow.parquet.read_metadata(file)
        size += sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    if size > MEMORY_LIMIT:
        import datasets

        paths = [os.fspath(file) for file in files]
        return datasets.load_dataset("parquet", data_files=paths, split="train", columns=columns).data.table
    parts = [pyarrow.parquet.ParquetFile(file).read(columns=columns) for file in files]
    first = parts[0].schema
    for file, part in zip(files, parts, strict=True):
        if part.schema.types != first.types or features_of(part.schema) != features_of(first):
            raise ValueError(f"{printable(file)}: its columns or classes differ from those of {printable(files[0])}")
    return pyarrow.concat_tables(parts).replace_schema_metadata(first.metadata)


def features_of(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """The Hugging Face features by column; empty without that metadata."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}  # written by something else under the same key
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _labels(
    where: str, column: pyarrow.ChunkedArray, names: Sequence[str] | None, known: Sequence[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Labels as int64 (missing ones -1) and class names. `known` are those of the train split, None when this is it."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if pyarrow.types.is_integer(kind):
        labels = pyarrow.compute.fill_null(column.cast(pyarrow.int64()), -1).to_numpy()
        if names is None and known is None:
            highest = int(labels.max(initial=-1))
            if highest >= len(labels):
                raise ValueError(f"{where}: labels run to {highest} in {len(labels)} rows; takes class numbers from 0")
            names = [str(label) for label in range(highest + 1)]
        return labels, list(names if names is not None else known or ())
    if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
        values = column.to_pylist()
        classes = list(known) if known is not None else sorted({value for value in values if value is not None})
        numbers = {name: number for number, name in enumerate(classes)}
        for row, value in enumerate(values):
            if value is not None and value not in numbers:
                raise ValueError(f"{where}, row {row}: unknown label {value!r}: the train split has no such class")
        return np.array([-1 if value is None else numbers[value] for value in values], dtype=np.int64), classes
    raise ValueError(f"{where}: got {kind}, takes integers or strings")
