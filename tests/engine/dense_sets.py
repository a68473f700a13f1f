"""Small dense data sets for tests: bright squares ("square") and discs ("disc") on dark noise, as files."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 32
CLASSES = ("square", "disc")


def scene(number: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, list[int]]]]:
    """A picture (h, w, 3), its label map (0 background, 1 square, 2 disc) and its objects (label, box).

    Sizes differ a little, so that batches are padded.
    """
    rng = np.random.default_rng(number)
    height, width = SIDE + 4 * (number % 3), SIDE + 4 * (number % 2)
    picture = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    labels = np.zeros((height, width), dtype=np.uint8)
    objects = []
    rows, columns = np.indices((height, width))
    for label in (0, 1):
        radius = int(rng.integers(4, 7))
        y, x = int(rng.integers(radius, height - radius)), int(rng.integers(radius, width - radius))
        if label == 0:
            inside = (abs(rows - y) < radius) & (abs(columns - x) < radius)
        else:
            inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        if (inside & (labels > 0)).any():
            continue
        labels[inside] = label + 1
        picture[inside] = (250, 200, 40) if label == 0 else (60, 160, 250)
        where = np.nonzero(inside)
        objects.append((label, [int(where[1].min()), int(where[0].min()), int(where[1].max()), int(where[0].max())]))
    return picture, labels, objects


def write_maps(folder: Path, counts: dict[str, int]) -> Path:
    """Pictures and label maps in folders: images/SPLIT and labels/SPLIT."""
    number = 0
    for split, count in counts.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for _ in range(count):
            picture, labels, _ = scene(number)
            Image.fromarray(picture).save(folder / "images" / split / f"{number}.png")
            Image.fromarray(labels).save(folder / "labels" / split / f"{number}.png")
            number += 1
    (folder / "classes.txt").write_text("\n".join(("background", *CLASSES)))
    return folder


def write_coco(folder: Path, counts: dict[str, int], *, masks: bool = True) -> Path:
    """Pictures with boxes (and polygons round the boxes) as COCO json, one folder for each split."""
    number = 0
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for _ in range(count):
            picture, _, objects = scene(number)
            Image.fromarray(picture).save(folder / split / f"{number}.png")
            images.append({"id": number, "file_name": f"{number}.png", "width": picture.shape[1],
                           "height": picture.shape[0]})  # fmt: skip
            for label, (left, top, right, bottom) in objects:
                box = [left, top, right + 1 - left, bottom + 1 - top]
                outline = [left, top, right + 1, top, right + 1, bottom + 1, left, bottom + 1]
                mask = {"segmentation": [outline]} if masks else {}
                where = {"image_id": number, "category_id": label + 3, "bbox": box, "area": box[2] * box[3]}
                annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **where, **mask})
            number += 1
        categories = [{"id": label + 3, "name": name} for label, name in enumerate(CLASSES)]
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (folder / split / "_annotations.coco.json").write_text(text)
    return folder
