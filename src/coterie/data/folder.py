"""A folder of pictures, one sub-folder per class: the layout of torchvision's ImageFolder.

    PATH/train/<class>/**/*.jpg, PATH/val/<class>/..., PATH/test/<class>/...      with splits, or
    PATH/<class>/**/*.jpg                                                         without: a tenth is held out.

Labels follow the sorted class names of the train split, as in ImageFolder. Symbolic links are followed (each folder
once per class). Hidden files and files that are not pictures by their extension are passed over. Class names are
compared in Unicode's composed form (NFC), because some systems decompose the names of files.
"""

from __future__ import annotations

import difflib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from coterie.data.images import EXTENSIONS, printable
from coterie.data.source import DataSource, ImageDataset, assemble, split_of

logger = logging.getLogger("coterie.data")


class Files(ImageDataset):
    """Pictures in files of their own."""

    def __init__(self, paths: Sequence[str], labels: Int64[np.ndarray, " samples"]) -> None:
        self.paths = list(paths)
        self.labels = labels

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def name(self, index: int) -> str:
        return printable(self.paths[index])


def open_folder(path: str) -> DataSource:
    """Open an image folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the layout is none of the two above, or a class folder holds no picture.
    """
    root = Path(path).expanduser()
    shown = printable(root)
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{shown}: " + ("not a folder" if root.exists() else "no such folder"))
    splits = _split_folders(root)
    classes: list[str] = []
    datasets: dict[str, ImageDataset] = {}
    for split, folder in splits.items():
        by_class = _class_folders(folder)
        if split != "train" and not by_class:
            logger.warning("%s: no class folders, so no labels: the %s split is left out", printable(folder), split)
            continue
        if split == "train":
            classes = sorted(by_class)
        datasets[split] = _files(by_class, classes)
    return assemble(root.resolve().name, classes, datasets)


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, train first; {"train": root} when the class folders lie directly in `root`."""
    found: dict[str, Path] = {}
    others = []
    for folder in _subfolders(root):
        split = split_of(folder.name)
        if split is None:
            others.append(folder.name)
        elif split in found:
            raise ValueError(
                f"{printable(root)}: both {found[split].name!r} and {folder.name!r} name the {split} split"
            )
        else:
            found[split] = folder
    if not found:
        return {"train": root}
    if "train" in found and _subfolders(found["train"]):
        return {"train": found.pop("train"), **found}
    if not others:
        raise ValueError(
            f"{printable(root)}: no training images: "
            + (f"{printable(found['train'])} has no class folders" if "train" in found else "no folder 'train'")
        )
    return {"train": root}  # classes that happen to be called "train" or "test"


def _class_folders(folder: Path) -> dict[str, list[str]]:
    """Picture paths by class name. Raises ValueError for pictures without a class and classes without a picture."""
    by_class: dict[str, list[str]] = {}
    subfolders = _subfolders(folder)
    if not subfolders:
        if split_of(folder.name) not in (None, "train"):
            return {}
        count = sum(_is_picture(entry.name) for entry in os.scandir(folder))
        raise ValueError(f"{printable(folder)}: no class folders (and {count} images outside of any)")
    for subfolder in subfolders:
        pictures, passed_over = _pictures(subfolder)
        if not pictures:
            kinds = ", ".join(kind for kind, _ in passed_over.most_common(5))
            raise ValueError(
                f"{printable(subfolder)}: class {printable(subfolder.name)!r} has no images"
                + (f" (only {sum(passed_over.values())} files of kind {kinds})" if passed_over else "")
                + "; remove the folder or fill it"
            )
        by_class.setdefault(unicodedata.normalize("NFC", printable(subfolder.name)), []).extend(pictures)
    return by_class


def _files(by_class: dict[str, list[str]], classes: Sequence[str]) -> Files:
    numbers = {name: label for label, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    for name in sorted(by_class):
        if name not in numbers:
            folder = os.path.dirname(printable(by_class[name][0]))
            close = difflib.get_close_matches(name, classes, n=1)
            raise ValueError(
                f"{folder}: unknown label {name!r}: the train split has no such class"
                + (f"; closest: {close[0]!r}" if close else "")
            )
        paths += by_class[name]
        labels += [numbers[name]] * len(by_class[name])
    return Files(paths, np.array(labels, dtype=np.int64))


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return [folder / name for name in sorted(names)]


def _pictures(folder: Path) -> tuple[list[str], Counter[str]]:
    """Paths of all pictures below `folder`, sorted, and how many files of each other kind were passed over."""
    pictures: list[str] = []
    passed_over: Counter[str] = Counter()
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        identity = os.stat(place).st_dev, os.stat(place).st_ino
        if identity in visited:  # a link back up would go round for ever
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if _is_picture(name):
                pictures.append(os.path.join(place, name))
            elif not name.startswith("."):
                passed_over[os.path.splitext(printable(name))[1].lower() or "without extension"] += 1
    return pictures, passed_over


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
