"""Folders of pictures and label maps, one picture of labels for each picture.

    PATH/train/*.png      PATH/trainannot/*.png       CamVid of the SegNet tutorial (also train_labels, train_masks)
    PATH/images/training  PATH/annotations/training   ADE20K: 0 is ignored, classes from objectInfo150.txt
    PATH/leftImg8bit/train/<city>  PATH/gtFine/train/<city>       Cityscapes: labelIds become the 19 train ids
    PATH/images/train     PATH/labels/train           any set (also masks, annotations; or PATH/train/images, ...)
    PATH/images           PATH/labels                 without splits: a tenth is held out

A label map is a grey or palette picture whose values are class numbers, 255 for pixels to ignore; or a picture of
colours, with a table in class_dict.csv (name,r,g,b) or label_colors.txt (r g b name). Names of the classes come from
classes.json or classes.txt, else from objectInfo150.txt or the table of colours; without any of them the values say
how many there are. Classes called unlabelled, void, ignore and the like are ignored, as are those of `ignore`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from coterie.data.annotations import IGNORE
from coterie.data.dense import MAX_BAD_SHARE, Problems, assemble_dense
from coterie.data.images import EXTENSIONS, printable
from coterie.data.label_maps import (
    LabelMapImages,
    Table,
    class_names,
    drop_ignored,
    sample_values,
    settle_values,
    value_table,
)
from coterie.data.source import DataSource, ImageDataset, split_of
from coterie.data.stores import Folder

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "leftImg8bit", "JPEGImages", "data")
MAP_FOLDERS = (
    "labels",
    "label",
    "masks",
    "mask",
    "annotations",
    "annotation",
    "annot",
    "labelmaps",
    "gtFine",
    "SegmentationClass",
)
_MAP_ENDINGS = re.compile(
    r"([-_]?(gtFine_labelTrainIds|gtFine_labelIds|leftImg8bit|labelTrainIds|labelIds|labels?|masks?|annot|seg|gt|L|P))$"
)
# fmt: off
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
# fmt: on
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The labelIds of the 19 classes that are evaluated, in the order of their train ids."""


def open_maps(path: str, ignore: str | None = None, *, max_bad_share: float = MAX_BAD_SHARE) -> DataSource:
    """Open a folder of pictures and label maps.

    Args:
        path: the folder.
        ignore: further classes to ignore: names or values, separated by commas.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no layout of the above, too many pictures without a label map or the reverse, or classes that
            cannot be told.
    """
    root = Path(path).expanduser()
    shown = f"maps:{printable(root)}"
    if not root.is_dir():
        raise FileNotFoundError(f"{shown}: " + ("not a folder" if root.exists() else "no such folder"))
    folders = find_folders(root)
    if not folders:
        raise ValueError(
            f"{shown}: no folders of pictures and label maps; takes train + trainannot, images/<split> + "
            "labels/<split> (or masks, annotations), <split>/images + <split>/labels, or leftImg8bit + gtFine"
        )
    if "train" not in folders:
        raise ValueError(f"{shown}: no training images, only {', '.join(folders)}")
    pairs = {split: _pair(*pair, max_bad_share) for split, pair in folders.items()}
    maps = {split: (folders[split], members) for split, members in pairs.items() if members}
    if "train" not in maps:
        raise ValueError(f"{printable(folders['train'][0])}: no pictures")
    classes, table = find_classes(root, [folders["train"][1] / name for _, name in maps["train"][1]], ignore)
    splits: dict[str, ImageDataset] = {
        split: LabelMapImages(Folder(image), Folder(label), members, len(classes), table)
        for split, ((image, label), members) in maps.items()
    }
    return assemble_dense(root.resolve().name, classes, splits)


def find_folders(root: Path) -> dict[str, tuple[Path, Path]]:
    """The folder of pictures and the folder of label maps of each split; empty where there is no such layout."""
    found: dict[str, tuple[Path, Path]] = {}

    def add(split: str, images: Path, labels: Path) -> None:
        if split in found and found[split] != (images, labels):
            raise ValueError(f"{printable(root)}: both {found[split][0]} and {images} hold the {split} split")
        found[split] = images, labels

    below = {folder.name: folder for folder in sorted(root.iterdir()) if folder.is_dir()}
    images = next((below[name] for name in IMAGE_FOLDERS if name in below), None)
    labels = next((below[name] for name in MAP_FOLDERS if name in below), None)
    if images is not None and labels is not None:
        for folder in sorted(images.iterdir()):
            split = split_of(folder.name)
            if folder.is_dir() and split is not None and (labels / folder.name).is_dir():
                add(split, folder, labels / folder.name)
        return found or {"train": (images, labels)}
    for name, folder in below.items():
        split = split_of(name)
        if split is None:
            continue
        inner = {place.name: place for place in folder.iterdir() if place.is_dir()}
        own = next((inner[key] for key in IMAGE_FOLDERS if key in inner), None)
        its = next((inner[key] for key in MAP_FOLDERS if key in inner), None)
        beside = next(
            (
                below[f"{name}{sign}{key}"]
                for sign in ("", "_", "-")
                for key in MAP_FOLDERS
                if f"{name}{sign}{key}" in below
            ),
            None,
        )
        if own is not None and its is not None:
            add(split, own, its)
        elif beside is not None:
            add(split, folder, beside)
    return found


def _pair(images: Path, labels: Path, max_bad_share: float) -> list[tuple[str, str]]:
    """Names of each picture and of its label map; those without the other are skipped and reported."""
    by_key: dict[str, str] = {}
    for name in _pictures(labels):
        stem = os.path.splitext(name)[0]
        if re.search(r"_(color|instanceIds|polygons|instances)$", stem):
            continue  # Cityscapes keeps other kinds of annotation beside
        key = _MAP_ENDINGS.sub("", stem)
        if key not in by_key or stem.endswith("labelTrainIds"):
            by_key[key] = name
    problems = Problems(printable(labels))
    pairs = []
    for name in _pictures(images):
        stem = os.path.splitext(name)[0]
        label = by_key.pop(stem, None) or by_key.pop(_MAP_ENDINGS.sub("", stem), None)
        if label is None:
            problems.skip(printable(images / name), f"no label map of that name in {printable(labels)}")
        else:
            pairs.append((name, label))
    for label in by_key.values():
        problems.skip(printable(labels / label), f"a label map without a picture in {printable(images)}")
    problems.check(len(pairs) + len(problems.skipped), max_bad_share)
    return pairs


def _pictures(folder: Path) -> list[str]:
    """Pictures below a folder, relative to it, sorted."""
    names = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(place, folder)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                names.append(os.path.normpath(os.path.join(relative, name)))
    return sorted(names)


def find_classes(root: Path, maps: Sequence[Path], ignore: str | None) -> tuple[list[str], Table]:
    """Names of the classes, and what each stored value means (see LabelMapImages)."""
    colours = _colours(root)
    if colours:
        names = list(colours)
        classes, numbers = drop_ignored(names, ignore, str(root))
        return classes, {colour: int(numbers[names.index(name)]) for name, colour in colours.items()}
    if any(path.stem.endswith("gtFine_labelTrainIds") for path in maps[:1]):
        return list(CITYSCAPES), value_table(np.arange(19))
    if any(path.stem.endswith("gtFine_labelIds") for path in maps[:1]):
        table = np.full(256, IGNORE, dtype=np.uint8)
        table[list(CITYSCAPES_IDS)] = np.arange(19)
        return list(CITYSCAPES), table
    stated, first = class_names(root), 0
    if stated is None and (stated := _ade20k(root)) is not None:
        first = 1  # value 0 is "other objects"
    sample = sample_values(len(maps), lambda index: maps[index].read_bytes(), lambda index: printable(maps[index]))
    return settle_values(str(root), stated, ignore, sample, first)


def _colours(root: Path) -> dict[str, tuple[int, int, int]]:
    """Colour by class name, of class_dict.csv or label_colors.txt; empty without either."""
    rows: Iterable[Sequence[str]] = ()
    file = root / "class_dict.csv"
    if file.is_file():
        with open(file, newline="", encoding="utf-8") as lines:
            rows = [row for row in csv.reader(lines) if len(row) >= 4 and row[1].strip().isdigit()]
    elif (file := root / "label_colors.txt").is_file():
        split = (line.split(None, 3) for line in file.read_text(encoding="utf-8").splitlines())
        rows = [[parts[3].strip(), *parts[:3]] for parts in split if len(parts) == 4]
    try:
        return {row[0].strip(): (int(row[1]), int(row[2]), int(row[3])) for row in rows}
    except ValueError as error:
        raise ValueError(f"{printable(file)}: not a table of names and colours: {error}") from error


def _ade20k(root: Path) -> list[str] | None:
    file = root / "objectInfo150.txt"
    if not file.is_file():
        return None
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
