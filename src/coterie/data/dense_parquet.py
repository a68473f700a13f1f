"""Parquet files with label maps or objects, as Hugging Face `datasets` writes them.

label maps   a column of pictures, a column of pictures of labels (struct of bytes and path); names of the classes
             in classes.json or classes.txt beside the files
objects      a column of pictures, a column `objects` of structs {bbox, category, ...} or a struct of such lists;
             bbox is left, top, width, height as in COCO; also area, iscrowd, segmentation, id
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coterie.data.dense import MAX_BAD_SHARE, assemble_dense
from coterie.data.images import BadSample, read_header
from coterie.data.instances import InstanceTable
from coterie.data.label_maps import LabelMapImages, class_names, sample_values, settle_values
from coterie.data.parquet import ArrowImages, choose_column, features_of, image_columns, open_tables
from coterie.data.source import DataSource, ImageDataset
from coterie.data.stores import Store

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger("coterie.data")

_USUAL_MAPS = ("label", "labels", "mask", "annotation", "segmentation", "label_map", "semantic_segmentation", "seg")


class _Rows(Store):
    """Pictures in a column of a table; the names are the numbers of the rows."""

    def __init__(self, images: ArrowImages) -> None:
        self.images = images

    def read(self, name: str) -> bytes:
        return self.images.read(int(name))

    def has(self, name: str) -> bool:
        return 0 <= int(name) < len(self.images)

    def path(self, name: str) -> str:
        return self.images.name(int(name))


def open_map_parquet(
    path: str, image: str | None = None, label: str | None = None, ignore: str | None = None
) -> DataSource:
    """Open parquet files of pictures and label maps. Raises as `coterie.data.parquet.open_parquet`."""

    def choose(where: str, schema: pyarrow.Schema) -> list[str]:
        pictures = image_columns(schema)
        maps = [name for name in pictures if name in _USUAL_MAPS] or pictures[1:]
        label_column = choose_column(where, "label", label, maps, schema)
        others = [name for name in pictures if name != label_column]
        return [choose_column(where, "image", image, others, schema), label_column]

    name, folder, tables, origins = open_tables(path, choose)
    stores = {
        split: [_Rows(_images(table.column(column), origins[split], folder)) for column in table.column_names]
        for split, table in tables.items()
    }
    maps = stores["train"][1].images
    sample = sample_values(len(maps), maps.read, maps.name)
    classes, table = settle_values(name, class_names(folder), ignore, sample)
    splits: dict[str, ImageDataset] = {
        split: LabelMapImages(
            pictures, labels, [(str(row), str(row)) for row in range(len(pictures.images))], len(classes), table
        )
        for split, (pictures, labels) in stores.items()
    }
    return assemble_dense(name, classes, splits)


def open_instance_parquet(
    path: str, image: str | None = None, label: str | None = None, max_bad_share: float = MAX_BAD_SHARE
) -> DataSource:
    """Open parquet files of pictures and objects; `label` names the column of objects. Raises as open_map_parquet."""

    def choose(where: str, schema: pyarrow.Schema) -> list[str]:
        objects = [name for name in schema.names if name in ("objects", "annotations", "instances")]
        return [
            choose_column(where, "image", image, image_columns(schema), schema),
            choose_column(where, "label", label, objects, schema),
        ]

    name, folder, tables, origins = open_tables(path, choose)
    names = class_names(folder)
    rows = {split: [_objects(cell) for cell in table.column(1).to_pylist()] for split, table in tables.items()}
    if names is None:
        train = tables["train"]
        names = _category_names(features_of(train.schema).get(train.column_names[1], {}))
    if names is None:
        found = {_category(entry) for row in rows["train"] for entry in row} - {None}
        numbers = [category for category in found if isinstance(category, int)]
        if len(numbers) == len(found):
            names = [str(number) for number in range(max(numbers, default=-1) + 1)]
        else:
            names = sorted(str(category) for category in found)
    splits: dict[str, ImageDataset] = {}
    for split, table in tables.items():
        store = _Rows(_images(table.column(0), origins[split], folder))
        splits[split] = _instances(f"{name} ({split})", store, rows[split], names, max_bad_share)
    return assemble_dense(name, names, splits)


def _instances(
    where: str, store: _Rows, rows: Sequence[list[dict[str, Any]]], names: Sequence[str], max_bad_share: float
) -> ImageDataset:
    table = InstanceTable(where, len(names))
    numbers = {name: number for number, name in enumerate(names)}
    for row, entries in enumerate(rows):
        try:
            header = read_header(store.read(str(row)), store.path(str(row)))
            size = header.height, header.width
        except (BadSample, OSError):
            size = 1, 1  # the Loader reports the picture when its turn comes; its objects cannot be judged
            entries = []
        table.add_picture(str(row), size)
        for place, entry in enumerate(entries):
            category = _category(entry)
            box = entry.get("bbox", entry.get("box"))
            if isinstance(box, Sequence) and len(box) == 4 and all(isinstance(side, int | float) for side in box):
                box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
            table.add_object(
                f"{store.path(str(row))}: object {entry.get('id', place)}",
                box,
                category if isinstance(category, int) else numbers.get(category),  # type: ignore[arg-type]
                crowd=bool(entry.get("iscrowd") or entry.get("is_crowd")),
                area=entry.get("area"),
                segmentation=entry.get("segmentation"),
                category=category,
            )
    return table.finish(store, max_bad_share)


def _objects(cell: Any) -> list[dict[str, Any]]:
    """The objects of a row, one mapping each, from a list of structs or a struct of lists."""
    if isinstance(cell, Mapping):
        lists = {key: value for key, value in cell.items() if isinstance(value, list)}
        count = min((len(value) for value in lists.values()), default=0)
        return [{key: value[place] for key, value in lists.items()} for place in range(count)]
    return [dict(entry) for entry in cell or [] if isinstance(entry, Mapping)]


def _category(entry: Mapping[str, Any]) -> Any:
    return entry.get("category", entry.get("label", entry.get("category_id")))


def _category_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel called "category", anywhere in the description of a column by `datasets`."""
    if isinstance(feature, Mapping):
        for key in ("category", "label", "category_id"):
            names = _class_label(feature.get(key))
            if names is not None:
                return names
        feature = list(feature.values())
    if isinstance(feature, list):
        return next((names for part in feature if (names := _category_names(part)) is not None), None)
    return None


def _class_label(feature: Any) -> list[str] | None:
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") == "ClassLabel":
        return list(feature["names"])
    return _class_label(feature.get("feature"))


def _images(column: pyarrow.ChunkedArray, origins: Mapping[str, int], folder: Path) -> ArrowImages:
    return ArrowImages(column, np.full(len(column), -1, dtype=np.int64), origins, folder)
