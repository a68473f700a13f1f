"""Parquet as Hugging Face datasets writes it, and variations of it."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from coterie.data import BadSample, open_data
from coterie.data import parquet as reader


@pytest.fixture
def write(tmp_path, encoded):
    """write(name, labels, ...) writes one parquet file of PNG pictures and gives its path."""

    def make(
        name="train.parquet",
        labels=(0, 1) * 10,
        names=("cat", "dog"),
        *,
        image="image",
        label="label",
        cells=None,
        kind="int64",
        extra=None,
        row_group_size=None,
    ):
        if cells is None:
            cells = [{"bytes": encoded("PNG", seed), "path": f"{seed}.png"} for seed in range(len(labels))]
        columns = {
            image: cells,
            label: pyarrow.array(labels, getattr(pyarrow, kind)() if kind else None),
            **(extra or {}),
        }
        table = pyarrow.table(columns)
        if names is not None:
            features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": list(names)}}
            features |= {column: {"_type": "Image"} for column in extra or ()}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
        return path

    return make


def test_what_datasets_writes_is_read(tmp_path, picture):
    import datasets

    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for split, count in (("train", 8), ("test", 4)):
        rows = {"img": [picture(seed) for seed in range(count)], "label": [seed % 2 for seed in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    source = open_data(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 1] * 4,
        "test": [0, 1] * 2,
    }
    assert (np.asarray(source.splits["train"][5].image) == np.asarray(picture(5))).all()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
        ("default/train/0000.parquet", "default/val/0000.parquet"),
        ("train0.parquet", "my_test_1.parquet"),
    ],
)
def test_file_names_tell_the_split(write, tmp_path, first, second):
    write(first, (0, 1) * 3)
    write(second, (0, 1))
    source = open_data(f"parquet:{tmp_path}")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 6, "test": 2}


def test_shards_and_row_groups_are_one_split_in_the_order_of_their_names(write, tmp_path):
    write("train-00001-of-00002.parquet", (1,) * 5, row_group_size=2)
    write("train-00000-of-00002.parquet", (0,) * 7, row_group_size=3)
    write("test.parquet", (0, 1))
    train = open_data(tmp_path).splits["train"]
    assert train.labels.tolist() == [0] * 7 + [1] * 5
    assert train.name(6) == f"{tmp_path}/train-00000-of-00002.parquet row 6 (6.png)"
    assert train.name(9) == f"{tmp_path}/train-00001-of-00002.parquet row 2 (2.png)"
    assert len({np.asarray(train[index].image).tobytes() for index in range(7)}) == 7


def test_one_file_is_split_by_class(write):
    source = open_data(write("test.parquet", [0] * 20 + [1] * 10))
    assert np.bincount(source.splits["test"].labels).tolist() == [2, 1]


def test_files_without_split_names_are_one_training_set_but_not_a_mixture(write, tmp_path):
    write("a.parquet"), write("b.parquet")
    assert sum(map(len, open_data(tmp_path).splits.values())) == 40
    write("train.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: the name tells no split"):
        open_data(tmp_path)
    (tmp_path / "sub").mkdir()
    write("sub/test.parquet")
    with pytest.raises(ValueError, match="no training images"):
        open_data(f"parquet:{tmp_path}/sub")


def test_integer_and_string_labels_without_metadata(write):
    assert open_data(write(names=None)).classes == ["0", "1"]
    source = open_data(write(labels=["dog", "cat"] * 10, names=None, kind="string"))
    assert source.classes == ["cat", "dog"]
    train = source.splits["train"]
    rows = [int(train.name(index).split("row ")[1].split()[0]) for index in range(len(train))]
    assert train.labels.tolist() == [1 - row % 2 for row in rows]
    categories = pyarrow.array(["dog", "cat"] * 10).dictionary_encode()
    assert open_data(write(labels=categories, names=None, kind=None)).classes == ["cat", "dog"]


def test_plain_binary_pictures(write, encoded):
    cells = [encoded("PNG", seed) for seed in range(20)]
    assert open_data(write(cells=cells, names=None)).splits["train"][0].image.size == (20, 16)


def test_pictures_outside_the_table_are_found_beside_it(write, encoded, tmp_path):
    (tmp_path / "pictures").mkdir()
    for seed in range(20):
        (tmp_path / "pictures" / f"{seed}.png").write_bytes(encoded("PNG", seed))
    source = open_data(write(cells=[{"bytes": None, "path": f"pictures/{seed}.png"} for seed in range(20)]))
    assert source.splits["train"][3].image.size == (20, 16)


def test_a_row_without_a_picture_is_a_bad_sample(write):
    path = write()
    table = pyarrow.parquet.read_table(path)
    cells = table.column("image").to_pylist()
    cells[0], cells[1], cells[2] = None, {"bytes": None, "path": None}, {"bytes": None, "path": "gone.png"}
    source = open_data(write(cells=cells))
    reasons = {}
    for split in source.splits.values():
        for index in range(len(split)):
            try:
                split[index]
            except BadSample as bad:
                reasons[bad.name.partition(".parquet ")[2]] = bad.reason
    assert reasons == {
        "row 0": "the row holds no picture",
        "row 1": "the row holds no picture",
        "row 2 (gone.png)": "No such file or directory",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": (0, 1, 2, 1)}, r"row 2 \(2.png\): label 2 is none of the 2 classes, takes 0 to 1"),
        ({"labels": (0, -1, 1, -5)}, r"row 1 \(1.png\): label -1 is none of the 2 classes.*and 1 more such"),
        ({"labels": (0, None, 1, 1)}, r"row 1 \(1.png\): label -1 is none"),
        ({"names": ("cat", "dog", "emu", "fox")}, "2 of 4 classes without a training image: 'emu', 'fox'"),
        ({"labels": (0, 2, 2, 0), "names": None}, "1 of 3 classes without a training image: '1'"),
        ({"labels": (7, 10**12), "names": None}, "labels run to 1000000000000 in 2 rows"),
        ({"labels": (0.0, 1.0), "names": None, "kind": "float32"}, "got float, takes integers or strings"),
        ({"labels": (), "cells": pyarrow.array([], pyarrow.binary()), "names": ("cat", "dog")}, "no training images"),
        (
            {"image": "photo", "label": "kind", "names": None},
            "no label column found; the columns are photo, kind: name one",
        ),
        ({"cells": list(range(20)), "names": None}, "no image column found; the columns are image, label"),
    ],
)
def test_what_cannot_be_trained_on_is_one_clear_line(write, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_data(write(**options))
    assert "\n" not in str(caught.value)


def test_columns_are_chosen_by_name(write, encoded):
    path = write(image="photo", label="kind", names=None)
    assert open_data(f"parquet:{path}?label=kind").classes == ["0", "1"]
    with pytest.raises(ValueError, match="no label column 'sort'; the columns are photo, kind"):
        open_data(f"parquet:{path}?label=sort")
    masks = [{"bytes": encoded("PNG", 1), "path": None}] * 20
    path = write("two.parquet", image="left", extra={"right": masks})
    with pytest.raises(ValueError, match=r"several image columns \(left, right\).*\?image=COLUMN"):
        open_data(path)
    assert open_data(f"parquet:{path}?image=right").splits["train"].name(0).endswith("row 0")
    with pytest.raises(ValueError, match="unknown option 'imge'; takes image, label"):
        open_data(f"parquet:{path}?imge=right")


def test_splits_must_agree_on_their_classes(write, tmp_path):
    write("train.parquet")
    write("test.parquet", names=("cat", "fox"))
    with pytest.raises(ValueError, match=r"test split: its classes are not those of the train split: \['dog', 'fox'\]"):
        open_data(tmp_path)
    write("train.parquet", ["a", "b"] * 5, None, kind="string")
    write("test.parquet", ["a", "c"], None, kind="string")
    with pytest.raises(ValueError, match=r"row 1: unknown label 'c'"):
        open_data(tmp_path)
    write("test.parquet", (-1, -1))
    write("train.parquet")
    assert np.bincount(open_data(tmp_path).splits["test"].labels).tolist() == [1, 1]


def test_a_damaged_or_missing_file(write, tmp_path):
    path = write()
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"parquet:.*the train split cannot be read: ") as caught:
        open_data(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_data("parquet:" + str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.parquet file"):
        open_data(f"parquet:{tmp_path}/empty")


def test_a_set_too_large_for_memory_goes_through_a_memory_map(write, tmp_path, monkeypatch):
    import datasets

    write("train.parquet", (0, 1) * 6, row_group_size=5)
    write("test.parquet", (0, 1))
    expected = open_data(tmp_path)
    monkeypatch.setattr(reader, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    mapped = open_data(tmp_path)
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert mapped.classes == expected.classes
    for split in ("train", "test"):
        for one, other in zip(mapped.splits[split], expected.splits[split], strict=True):
            assert one.image.tobytes() == other.image.tobytes()
            assert one[1:] == other[1:]


def test_a_dataset_can_be_sent_to_another_process(write):
    train = open_data(write()).splits["train"]
    copy = pickle.loads(pickle.dumps(train))
    assert copy[3].image.tobytes() == train[3].image.tobytes()
