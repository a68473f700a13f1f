"""Parquet files with label maps and with objects, as `datasets` writes them."""

from __future__ import annotations

import io
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from coterie.data import IGNORE, BadSample, open_data

NAMES = ["cat", "dog"]


def cell(data):
    return {"bytes": data, "path": None}


def labels(seed, highest=2):
    return np.random.default_rng(seed).integers(0, highest + 1, (16, 20), dtype=np.uint8)


def label_bytes(seed, highest=2):
    buffer = io.BytesIO()
    Image.fromarray(labels(seed, highest)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def write(tmp_path, encoded):
    """Writes columns beside a column of pictures: write("train", {"label": [...]}) gives the folder."""

    def make(split, columns, image="image"):
        count = len(next(iter(columns.values())))
        pictures = [cell(encoded("PNG", number)) for number in range(count)]
        table = pyarrow.table({**columns, image: pictures})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
        return tmp_path

    return make


@pytest.mark.parametrize("names", [("image", "label"), ("photo", "mask"), ("img", "depth")])
def test_label_maps(write, names):
    image, label = names
    for split, count in (("train", 3), ("val", 2)):
        root = write(split, {label: [cell(label_bytes(number)) for number in range(count)]}, image)
    options = "" if label != "depth" else "?label=depth"
    source = open_data(f"parquet:{root}{options}", target="label_map")
    assert source.describe().endswith(": 3 classes, 3 train, 2 test images with label maps, 20x16 RGB")
    assert np.array_equal(source.splits["train"].target(2), labels(2))
    assert source.splits["train"].name(2).endswith("train.parquet row 2")
    assert source.splits["train"].image(0).size == (20, 16)
    (root / "classes.json").write_text(json.dumps(["cat", "void", "dog"]))
    source = open_data(f"parquet:{root}{options}", target="label_map")
    assert source.classes == NAMES
    assert np.array_equal(source.splits["train"].target(2), np.array([0, IGNORE, 1])[labels(2)])
    (root / "classes.json").write_text(json.dumps(NAMES))
    with pytest.raises(BadSample, match=r"train\.parquet row 1: label value 2 at row .* none of the 2 classes"):
        open_data(f"parquet:{root}{options}", target="label_map").splits["train"].target(1)


def objects(count, **more):
    return {
        "bbox": [[2.0, 3.0, 10.0, 8.0]] * count,
        "category": [number % 2 for number in range(count)],
        "area": [80.0] * count,
        **more,
    }


def as_list(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("form", ["lists", "structs"])
def test_objects(write, form):
    for split, counts in (("train", (3, 1, 2)), ("test", (2, 0))):
        rows = [objects(count) if form == "lists" else as_list(objects(count)) for count in counts]
        root = write(split, {"objects": rows})
    (root / "classes.txt").write_text("cat\ndog\n")
    source = open_data(root, target="instances")
    assert source.describe().endswith(": 2 classes, 3 train, 2 test images with boxes, 20x16 RGB")
    found = source.splits["train"].target(0)
    assert found.boxes.tolist() == [[2, 3, 12, 11]] * 3
    assert found.labels.tolist() == [0, 1, 0]
    assert len(source.splits["test"].target(1)) == 0


def test_masks_crowds_and_names_of_categories(write):
    polygon = [[2.0, 3.0, 12.0, 3.0, 12.0, 11.0, 2.0, 11.0]]
    rows = [as_list(objects(2, segmentation=[polygon] * 2, iscrowd=[0, 1])) for _ in range(2)]
    for row in rows:
        for entry in row:
            entry["category"] = NAMES[entry["category"]]
    for split in ("train", "test"):
        root = write(split, {"objects": rows})
    source = open_data(root, target="instances")
    assert (source.classes, source.has_masks) == (NAMES, True)
    found = source.splits["test"].target(1)
    assert found.crowd.tolist() == [False, True]
    assert found.decode().sum((1, 2)).tolist() == [80, 80]


def test_what_datasets_writes(tmp_path, picture):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "objects": datasets.Sequence(
                {
                    "bbox": datasets.Sequence(datasets.Value("float32"), length=4),
                    "category": datasets.ClassLabel(names=NAMES),
                }
            ),
        }
    )
    rows = {
        "image": [picture(number) for number in range(3)],
        "objects": [{"bbox": [[2, 3, 10, 8]], "category": [1]}] * 3,
    }
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    source = open_data(tmp_path, target="instances")
    assert source.classes == NAMES
    assert source.splits["train"].target(2).labels.tolist() == [1]


def test_a_bad_object_names_file_and_row(write, caplog):
    bad = objects(3)
    bad["bbox"][1] = [2.0, 3.0, 0.0, 8.0]
    for split, rows in (("train", [objects(2), bad]), ("test", [objects(1)])):
        root = write(split, {"objects": rows})
    source = open_data(root, target="instances")
    assert len(source.splits["train"].target(1)) == 2
    assert "train.parquet row 1: object 1: box 2, 3 to 2, 11 has no area" in caplog.text


def test_columns_that_are_missing(write, encoded):
    root = write("train", {"other": [1, 2]})
    with pytest.raises(ValueError, match="no label column found; the columns are other, image"):
        open_data(root, target="label_map")
    with pytest.raises(ValueError, match="no label column found; the columns are other, image"):
        open_data(root, target="instances")
    with pytest.raises(ValueError, match="no label column 'objects'"):
        open_data(f"parquet:{root}?label=objects", target="instances")
    with pytest.raises(ValueError, match="unknown option 'split'; takes ignore, image, label"):
        open_data(f"parquet:{root}?split=train", target="label_map")
