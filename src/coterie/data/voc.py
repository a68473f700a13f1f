"""Pascal VOC: an xml file of boxes for each picture.

    PATH/Annotations/*.xml   PATH/JPEGImages/*.jpg   PATH/ImageSets/Main/{train,val,test}.txt

PATH is such a folder or one that holds it (VOCdevkit/VOC2012). Without lists of splits, a folder for each split works
too (PATH/train/*.xml beside the pictures, as labelling tools export), or all of it is one set and a tenth is held out.
Boxes count pixels from 1 and include their last one. Objects marked "difficult" are treated as COCO's crowds are: not
trained on, ignored in evaluation. Label maps (SegmentationClass) are read with ImageSets/Segmentation: class 0 is
background, 255 is ignored. Format: host.robots.ox.ac.uk/pascal/VOC.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from coterie.data.dense import MAX_BAD_SHARE, assemble_dense
from coterie.data.images import EXTENSIONS, BadSample, printable, read_header
from coterie.data.instances import InstanceTable
from coterie.data.label_maps import LabelMapImages, value_table
from coterie.data.source import DataSource, ImageDataset, split_of
from coterie.data.stores import Folder

# fmt: off
CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on


def open_voc(path: str, target: str = "instances", *, max_bad_share: float = MAX_BAD_SHARE) -> DataSource:
    """Open a Pascal VOC folder: boxes, or label maps.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not that layout, an xml file that cannot be read, or too many bad annotations.
    """
    root = Path(path).expanduser()
    shown = f"voc:{printable(root)}"
    if not root.is_dir():
        raise FileNotFoundError(f"{shown}: " + ("not a folder" if root.exists() else "no such folder"))
    if target == "label_map":
        return _open_maps(find_root(root, "SegmentationClass"), shown)
    found = find_root(root, "Annotations")
    if found is not None:
        images = next((found / name for name in ("JPEGImages", "images", "Images") if (found / name).is_dir()), found)
        files = {
            split: [(found / "Annotations" / f"{name}.xml", images) for name in names]
            for split, names in _lists(found, "Main").items()
        }
        if not files:
            files = {"train": [(file, images) for file in sorted((found / "Annotations").glob("*.xml"))]}
    else:
        files = {
            split: [(file, folder) for file in sorted(folder.glob("*.xml"))]
            for folder in sorted(root.iterdir())
            if folder.is_dir() and (split := split_of(folder.name)) is not None
        } or {"train": [(file, root) for file in sorted(root.glob("*.xml"))]}
    files = {split: members for split, members in files.items() if members}
    if "train" not in files:
        raise ValueError(
            f"{shown}: no training annotations; takes Annotations/*.xml + JPEGImages (+ ImageSets/Main), or "
            "<split>/*.xml beside the pictures"
        )
    parsed = {split: [(file, images, parse_xml(file)) for file, images in members] for split, members in files.items()}
    names = {name for _, _, tree in parsed["train"] for name, _ in _objects(tree)}
    classes = list(CLASSES) if names <= set(CLASSES) else sorted(names)
    splits: dict[str, ImageDataset] = {
        split: _read_split(f"{shown} ({split})", root, members, classes, max_bad_share)
        for split, members in parsed.items()
    }
    return assemble_dense((found or root).resolve().name, classes, splits)


def find_root(root: Path, name: str) -> Path | None:
    """The folder that holds the folder `name`: `root` or one of at most two levels below."""
    candidates = [root / name, *sorted(root.glob(f"*/{name}")), *sorted(root.glob(f"*/*/{name}"))]
    return next((place.parent for place in candidates if place.is_dir()), None)


def parse_xml(file: Path) -> ElementTree.Element:
    """Read a small xml file. A document type, with which entities could be defined that expand without end, is refused.

    Raises:
        ValueError: no xml, or one with a document type.
    """
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def refuse(*_: Any) -> None:
        raise ValueError(f"{printable(file)}: an xml file with a document type (DOCTYPE) is not read")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(file.read_bytes(), True)
        return builder.close()
    except FileNotFoundError as error:
        raise ValueError(f"{printable(file)}: a list of ImageSets names it, and there is no such file") from error
    except (expat.ExpatError, OSError) as error:
        raise ValueError(f"{printable(file)}: not an xml file: {error}") from error


def _lists(root: Path, kind: str) -> dict[str, list[str]]:
    """Names of pictures by split, from ImageSets. Lists of single classes ("cat_train.txt") are passed over."""
    lists = {}
    for file in sorted((root / "ImageSets" / kind).glob("*.txt")):
        split = split_of(file.stem)
        if split is not None:
            lines = file.read_text(encoding="utf-8").splitlines()
            lists[split] = [line.split()[0] for line in lines if line.strip()]
    return lists


def _objects(tree: ElementTree.Element) -> list[tuple[str, ElementTree.Element]]:
    """Class name and element of each object."""
    return [((entry.findtext("name") or "").strip(), entry) for entry in tree.iter("object")]


def _read_split(
    where: str,
    root: Path,
    members: list[tuple[Path, Path, ElementTree.Element]],
    classes: list[str],
    max_bad_share: float,
) -> ImageDataset:
    table = InstanceTable(where, len(classes))
    numbers = {name: number for number, name in enumerate(classes)}
    store = Folder(root)
    for file, images, tree in members:
        picture = os.path.relpath(_picture_of(file, images, tree), root)
        table.add_picture(picture, _size(tree, store, picture, file))
        for number, (name, entry) in enumerate(_objects(tree), 1):
            table.add_object(
                f"{printable(file)}: object {number}",
                _box(entry.find("bndbox")),
                numbers.get(name),
                crowd=(entry.findtext("difficult") or "0").strip() == "1",
                category=name,
            )
    return table.finish(store, max_bad_share)


def _picture_of(file: Path, images: Path, tree: ElementTree.Element) -> Path:
    """The picture that an annotation is about: the one it names, else the one that is called as it is."""
    named = images / os.path.basename((tree.findtext("filename") or "").strip().replace("\\", "/"))
    if named.is_file():
        return named
    beside = (images / f"{file.stem}{ending}" for ending in (".jpg", ".png", ".jpeg", *sorted(EXTENSIONS)))
    return next(
        (place for place in beside if place.is_file()), named if named != images else images / f"{file.stem}.jpg"
    )


def _size(tree: ElementTree.Element, store: Folder, picture: str, file: Path) -> tuple[int, int]:
    try:
        size = int(tree.findtext("size/height") or 0), int(tree.findtext("size/width") or 0)
    except ValueError:
        size = 0, 0
    if min(size) > 0:
        return size
    try:
        header = read_header(store.read(picture), store.path(picture))
    except (OSError, BadSample) as error:
        raise ValueError(f"{printable(file)}: states no size, and its picture cannot be read: {error}") from error
    return header.height, header.width


def _box(element: ElementTree.Element | None) -> Any:
    """Corners; pixels count from 1 there, and the last one belongs to the box."""
    if element is None:
        return None
    texts = [(element.findtext(side) or "").strip() for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(text) for text in texts)
    except ValueError:
        return texts
    return left - 1, top - 1, right, bottom


def _open_maps(root: Path | None, shown: str) -> DataSource:
    if root is None:
        raise ValueError(f"{shown}: no folder SegmentationClass, so no label maps")
    lists = _lists(root, "Segmentation")
    if not lists:
        lists = {"train": sorted(file.stem for file in (root / "SegmentationClass").glob("*.png"))}
    classes = ["background", *CLASSES]
    table = value_table(np.arange(len(classes)))
    images, maps = Folder(root / "JPEGImages"), Folder(root / "SegmentationClass")
    splits: dict[str, ImageDataset] = {
        split: LabelMapImages(images, maps, [(f"{name}.jpg", f"{name}.png") for name in names], len(classes), table)
        for split, names in lists.items()
    }
    return assemble_dense(root.resolve().name, classes, splits)
