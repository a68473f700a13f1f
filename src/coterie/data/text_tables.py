"""Documents in a column of a table: parquet files, and sets of the Hugging Face hub. Every row is one document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.data.hub import load_from_hub
from coterie.data.parquet import open_tables
from coterie.data.source import split_of

if TYPE_CHECKING:
    import pyarrow

USUAL = ("text", "content", "document", "sentence")


def open_parquet_texts(path: Path, column: str | None) -> dict[str, list[bytes]]:
    """The documents of one parquet file or a folder of them, by split.

    Raises:
        FileNotFoundError: no such file, or no parquet file in the folder.
        ValueError: a file cannot be read, or no column of text (or several) and none was named.
    """
    tables = open_tables(str(path), lambda where, schema: [_choose(where, schema, column)])[2]
    return {split: _documents(table.column(0)) for split, table in tables.items()}


def open_hub_texts(name: str, config: str | None, column: str | None) -> dict[str, list[bytes]]:
    """The documents of a set of the hub, by split. Raises ValueError if it cannot be had or holds no text."""
    shown, loaded = load_from_hub(name, config)
    splits: dict[str, list[bytes]] = {}
    for key, part in loaded.items():
        meaning = split_of(str(key))
        if meaning is not None:
            table = part.flatten_indices().data.table
            splits.setdefault(meaning, []).extend(_documents(table.column(_choose(shown, table.schema, column))))
    return splits


def _choose(where: str, schema: pyarrow.Schema, column: str | None) -> str:
    import pyarrow

    def is_text(kind: Any) -> bool:
        return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)

    found = [field.name for field in schema if is_text(field.type)]
    if column is not None:
        if column not in found:
            raise ValueError(f"{where}: no column of text {column!r}; there are {', '.join(found) or 'none'}")
        return column
    chosen = [name for name in USUAL if name in found] or found
    if not chosen or (len(chosen) > 1 and chosen[0] not in USUAL):
        there = f"several columns of text ({', '.join(found)})" if found else "no column of text"
        raise ValueError(f"{where}: {there}; name one by ?text=COLUMN")
    return chosen[0]


def _documents(column: Any) -> list[bytes]:
    return [text.encode() for text in column.to_pylist() if text]
