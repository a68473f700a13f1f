"""Dense predictions as files that the usual tools read, and as plain data for programs.

    instances    one COCO file: images, categories and annotations, each annotation with its score; the list under
                 "annotations" is what `pycocotools.coco.COCO.loadRes` takes
    label maps   one PNG for each image, a byte for each pixel that is the number of its class, with a palette of the
                 drawn colours, as Pascal VOC and ADE20K keep theirs

Formats: cocodataset.org/#format-data and host.robots.ox.ac.uk/pascal/VOC.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coterie.engine.evaluation import Prediction

Answer = dict[str, Any]


def keep_certain(answer: Answer, least: float) -> Answer:
    """The instances of an answer with a score of at least `least`, the surest first; a label map as it is."""
    if "scores" not in answer:
        return answer
    order = np.argsort(-answer["scores"], kind="stable")
    order = order[answer["scores"][order] >= least]
    return {name: values[order] for name, values in answer.items()}


def coco_numbers(file: Path, classes: Sequence[str], images: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The numbers that a COCO annotation file gives to images, by path, and to classes, by name.

    Images are found by the name of their file, wherever it lies.

    Raises:
        ValueError: not such a file; a class, or an image, that it does not have, or has twice.
    """
    try:
        document = json.loads(file.read_bytes())
        entries = [(Path(entry["file_name"]).name, int(entry["id"])) for entry in document["images"]]
        categories = {str(entry["name"]): int(entry["id"]) for entry in document["categories"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a COCO annotation file: {type(error).__name__}: {error}") from error
    if missing := [name for name in classes if name not in categories]:
        raise ValueError(f"{file}: no category {missing[0]!r}; it has {', '.join(sorted(categories)[:10])}")
    known: dict[str, list[int]] = {}
    for name, number in entries:
        known.setdefault(name, []).append(number)
    for path in images:
        if len(found := known.get(Path(path).name, [])) != 1:
            raise ValueError(f"{file}: {len(found) or 'no'} images of the name {Path(path).name}, takes one")
    return {path: known[Path(path).name][0] for path in images}, categories


def coco_text(
    predictions: Sequence[dict[str, Any]],
    classes: Sequence[str],
    numbers: tuple[dict[str, int], dict[str, int]] | None = None,
) -> str:
    """Instances, as `plain` gives them, as one COCO file. Images and categories have the numbers of `coco_numbers`, or
    count from 1."""
    if numbers is None:
        paths = [known["image"] for known in predictions]
        numbers = (
            {path: i for i, path in enumerate(paths, start=1)},
            {name: i for i, name in enumerate(classes, start=1)},
        )
    image_ids, category_ids = numbers
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for known in predictions:
        number = image_ids[known["image"]]
        images.append({"id": number, "file_name": known["image"], "width": known["width"], "height": known["height"]})
        for entry in known["instances"]:
            left, top, right, bottom = entry["box"]
            mask = {"segmentation": entry["mask"]} if "mask" in entry else {}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category_ids[entry["class"]],
                    "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                    "area": entry["area"],
                    "iscrowd": 0,
                    "score": entry["score"],
                    **mask,
                }
            )
    categories = [{"id": category_ids[name], "name": name} for name in classes]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories})


def instances(answer: Answer, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each instance as plain data: class, label, score, box (left, top, right, bottom), area, and its mask as COCO's
    run lengths where there is one. Pixels, to two decimals."""
    entries = []
    for index, label in enumerate(answer["labels"].tolist()):
        box = [round(float(value), 2) for value in answer["boxes"][index]]
        entry = {
            "class": classes[label],
            "label": label,
            "score": round(float(answer["scores"][index]), 4),
            "box": box,
            "area": round((box[2] - box[0]) * (box[3] - box[1]), 2),
        }
        if "masks" in answer:
            entry |= {"mask": run_lengths(answer["masks"][index]), "area": int(answer["masks"][index].sum())}
        entries.append(entry)
    return entries


def shares(answer: Answer, classes: Sequence[str]) -> list[tuple[str, float]]:
    """The classes of a label map with their shares of its pixels, the largest first; absent ones are left out."""
    counts = np.bincount(answer["label_map"].ravel(), minlength=len(classes))[: len(classes)]
    order = np.argsort(-counts, kind="stable")
    total = max(int(counts.sum()), 1)
    return [(classes[label], counts[label] / total) for label in order.tolist() if counts[label]]


def run_lengths(mask: UInt8[np.ndarray, "height width"]) -> dict[str, Any]:
    """A mask as COCO's compressed run lengths, its text ready for JSON."""
    from pycocotools import mask as codec

    encoded = codec.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode("ascii")}


def label_map_png(label_map: UInt8[np.ndarray, "height width"], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A label map as a PNG of one byte per pixel; `palette` gives the colour of each class."""
    image = Image.fromarray(np.ascontiguousarray(label_map, dtype=np.uint8))
    image.putpalette([value for colour in palette for value in colour])
    return png(image)


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def plain(prediction: Prediction, classes: Sequence[str]) -> dict[str, Any]:
    """A dense prediction as plain data for JSON: the instances, or the share of each class."""
    if prediction.image is None:
        raise ValueError(f"{prediction.path}: there is no picture, so nothing is known about its pixels")
    width, height = prediction.image.size
    known: dict[str, Any] = {"image": prediction.path, "width": width, "height": height}
    if "label_map" in prediction.answers:
        return {**known, "shares": {name: round(share, 6) for name, share in shares(prediction.answers, classes)}}
    return {**known, "instances": instances(prediction.answers, classes)}


def fit(image: Image.Image, answer: Answer, least: int = 256, most: int | None = None) -> tuple[Image.Image, Answer]:
    """A picture and its answer at a size that lines and legends, of a thickness in pixels, suit.

    Args:
        image: The picture.
        answer: Boxes, masks or a label map in its pixels.
        least: A longer side below this is brought to at least this by a whole factor.
        most: A longer side above this is brought to this; None leaves large pictures as they are.
    """
    longer = max(image.size)
    if longer < least:
        factor = float(-(-least // longer))
    elif most is not None and longer > most:
        factor = most / longer
    else:
        return image, answer
    width, height = (max(round(side * factor), 1) for side in image.size)
    rows = ((np.arange(height) + 0.5) * image.height / height).astype(int)
    columns = ((np.arange(width) + 0.5) * image.width / width).astype(int)
    fitted = dict(answer)
    if "boxes" in answer:
        fitted["boxes"] = answer["boxes"] * np.array([width / image.width, height / image.height] * 2, dtype=np.float32)
    for name in ("label_map", "masks"):
        if name in answer:
            fitted[name] = answer[name][..., rows, :][..., columns]
    return image.resize((width, height), Image.Resampling.BICUBIC), fitted
