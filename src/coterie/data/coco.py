"""Instance annotations in COCO's json format, in the layouts that are in use:

    PATH/annotations/instances_train2017.json   PATH/train2017/*.jpg          COCO's own (or PATH/images/train2017)
    PATH/train/_annotations.coco.json           PATH/train/*.jpg              a folder for each split
    PATH/instances_train.json                   PATH/images/*.jpg             files beside each other
    PATH.json                                   pictures beside it            one file: a tenth is held out

Instead of folders of pictures there may be one uncompressed tar file beside or above the json; it is not unpacked.
Category numbers may have gaps: classes are the categories of the train split in the order of their numbers. Masks may
be polygons or run lengths. Format: cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coterie.data.dense import MAX_BAD_SHARE, assemble_dense
from coterie.data.images import BadSample, printable, read_header
from coterie.data.instances import InstanceTable
from coterie.data.source import DataSource, ImageDataset, split_of
from coterie.data.stores import Folder, Store, Tar, find_store

_LONGEST = 2**20
"""Pixels on a side that are taken for a mistake."""


def open_coco(path: str, *, max_bad_share: float = MAX_BAD_SHARE) -> DataSource:
    """Open a COCO json file, or a folder of them with their pictures.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no annotation file, one that is not in COCO's format, no pictures, or too many bad annotations.
    """
    root = Path(path).expanduser()
    shown = f"coco:{printable(root)}"
    if not root.exists():
        raise FileNotFoundError(f"{shown}: no such file or folder")
    files = find_annotations(root)
    if not files:
        raise ValueError(
            f"{shown}: no annotation file; takes annotations/instances_<split>.json, instances_<split>.json or "
            "<split>/_annotations.coco.json"
        )
    if "train" not in files:
        raise ValueError(f"{shown}: no annotations for training, only for {', '.join(files)}")
    classes: list[str] = []
    splits: dict[str, ImageDataset] = {}
    folder = root if root.is_dir() else root.parent
    for split in sorted(files, key=lambda split: split != "train"):
        file = files[split]
        document = _load(file)
        categories = _categories(file, document)
        if split == "train":
            classes = list(categories.values())
        unknown = sorted(set(categories.values()) - set(classes))
        if unknown:
            raise ValueError(f"{printable(file)}: category {unknown[0]!r} is not among those of the train split")
        numbers = {key: classes.index(name) for key, name in categories.items()}
        splits[split] = _read_split(file, folder, document, numbers, max_bad_share)
    return assemble_dense(root.resolve().stem, classes, splits)


def find_annotations(root: Path) -> dict[str, Path]:
    """The annotation file of each split. Raises ValueError where two files mean one split."""
    if root.is_file():
        return {"train": root}
    found: dict[str, Path] = {}
    candidates = [
        *sorted(root.glob("annotations/instances_*.json")),
        *sorted(root.glob("instances_*.json")),
        *sorted(root.glob("*/_annotations.coco.json")),
    ]
    for file in candidates:
        if file.name == "_annotations.coco.json":
            split = split_of(file.parent.name)
        else:
            words = re.split(r"[-_. ]", file.stem)[1:]
            split = next((split for word in words if (split := split_of(re.sub(r"\d+$", "", word)))), None)
        if split is None:
            continue
        if split in found:
            raise ValueError(f"{printable(root)}: both {found[split].name} and {file.name} hold the {split} split")
        found[split] = file
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise ValueError(f"{printable(file)}: not a json file: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise ValueError(f"{printable(file)}: no list {key!r}, so no instances in COCO's format")
    return document


def _categories(file: Path, document: Mapping[str, Any]) -> dict[int, str]:
    """Names by number, in the order of the numbers."""
    names: dict[int, str] = {}
    for category in document["categories"]:
        try:
            number, name = int(category["id"]), str(category["name"])
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{printable(file)}: category {category!r} lacks an id or a name") from error
        if number in names or name in names.values():
            raise ValueError(f"{printable(file)}: two categories of the number {number} or the name {name!r}")
        names[number] = name
    return dict(sorted(names.items()))


def _read_split(
    file: Path, root: Path, document: Mapping[str, Any], numbers: Mapping[int, int], max_bad_share: float
) -> ImageDataset:
    shown = printable(file)
    table = InstanceTable(shown, len(set(numbers.values())))
    pictures: dict[Any, dict[str, Any]] = {}
    for picture in document["images"]:
        if not isinstance(picture, dict) or not isinstance(picture.get("file_name"), str) or not _is_id(picture):
            raise ValueError(f"{shown}: image {picture!r} lacks an id or a file_name")
        if picture["id"] in pictures:
            raise ValueError(f"{shown}: two images of the id {picture['id']!r}")
        pictures[picture["id"]] = picture
    if not pictures:
        raise ValueError(f"{shown}: no images")
    store = _pictures_of(file, root, [picture["file_name"] for picture in pictures.values()])
    by_picture: dict[Any, list[dict[str, Any]]] = {key: [] for key in pictures}
    for annotation in document["annotations"]:
        key = annotation.get("image_id") if isinstance(annotation, dict) else None
        if isinstance(key, int | str) and key in by_picture:
            by_picture[key].append(annotation)
        else:
            table.seen += 1
            number = annotation.get("id") if isinstance(annotation, dict) else annotation
            table.problems.skip(f"{shown}: annotation {number}", f"there is no image of the id {key!r}")
    for key, picture in pictures.items():
        table.add_picture(picture["file_name"], _size(picture, store, shown))
        for annotation in by_picture[key]:
            category = annotation.get("category_id")
            table.add_object(
                f"{shown}: annotation {annotation.get('id')} of {printable(picture['file_name'])}",
                _corners(annotation.get("bbox")),
                numbers.get(category) if isinstance(category, int) else None,
                crowd=bool(annotation.get("iscrowd", 0)),
                area=annotation.get("area"),
                segmentation=annotation.get("segmentation"),
                category=category,
            )
    return table.finish(store, max_bad_share)


def _is_id(picture: Mapping[str, Any]) -> bool:
    return isinstance(picture.get("id"), int | str)


def _corners(box: Any) -> Any:
    """COCO's left, top, width, height as corners; what is no box is passed on, to be named."""
    try:
        left, top, width, height = (float(side) for side in box)
    except (TypeError, ValueError):
        return box
    return left, top, left + width, top + height


def _size(picture: Mapping[str, Any], store: Store, shown: str) -> tuple[int, int]:
    """(height, width) by the annotation file, or of the picture where the file does not say."""
    size = picture.get("height"), picture.get("width")
    if all(isinstance(side, int) and 0 < side < _LONGEST for side in size):
        return size  # type: ignore[return-value]
    name = picture["file_name"]
    try:
        header = read_header(store.read(name), store.path(name))
    except (OSError, BadSample) as error:
        raise ValueError(f"{shown}: image {name!r} has no height and width, and cannot be read: {error}") from error
    return header.height, header.width


def _pictures_of(file: Path, root: Path, names: list[str]) -> Store:
    """Where the pictures lie. Raises ValueError when none of those looked for is anywhere."""
    names = names[:: max(len(names) // 16, 1)]
    store = find_store(names, _places(file, root))
    if store is None:
        raise ValueError(
            f"{printable(file)}: none of its images is found, for example {printable(names[0])}; looked beside the "
            f"file, in its neighbour folders, in 'images' and in tar files of {printable(root)}"
        )
    return store


def _places(file: Path, root: Path) -> Iterator[Store]:
    words = re.split(r"[-_. ]", file.stem)
    tails = ["", "_".join(words[1:]), *words[1:]]
    tops = dict.fromkeys([file.parent, root, file.parent.parent])
    for top in tops:
        for middle in ("", "images", "data"):
            for tail in dict.fromkeys(tails):
                folder = top / middle / tail
                if folder.is_dir():
                    yield Folder(folder)
    for top in tops:
        for archive in sorted(top.glob("*.tar")):
            tar = Tar(archive)
            # The split's own folder first: two splits may use the same names.
            for prefix in sorted(tar.folders(), key=lambda prefix: Path(prefix).name not in words):
                yield tar.below(prefix)
