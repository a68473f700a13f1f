"""WebDataset shards."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from coterie.data import BadSample, open_data


@pytest.fixture
def write(tmp_path, encoded):
    """write(name, members) writes a tar file; True stands for a picture, anything else for text."""

    def make(name, members):
        path = tmp_path / name
        with tarfile.open(path, "w") as tar:
            for seed, (member, content) in enumerate(members):
                data = encoded("JPEG", seed) if content is True else str(content).encode()
                entry = tarfile.TarInfo(member)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
        return path

    return make


def samples(labels, start=0):
    return [pair for i, label in enumerate(labels, start) for pair in ((f"{i:04}.jpg", True), (f"{i:04}.cls", label))]


def test_shards_of_two_splits_by_a_brace_pattern(write, tmp_path):
    write("pets-train-000.tar", samples([0, 1, 2]))
    write("pets-train-001.tar", samples([2, 1, 0], 3))
    write("pets-test-000.tar", samples([1, 2]))
    source = open_data(f"webdataset:{tmp_path}/pets-{{train-{{000..001}},test-000}}.tar")
    assert source.classes == ["0", "1", "2"]
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 1, 2, 2, 1, 0],
        "test": [1, 2],
    }
    sample = source.splits["train"][4]
    assert (sample.image.size, sample.name) == ((20, 16), f"{tmp_path}/pets-train-001.tar:0004")
    assert [len(s) for s in open_data(tmp_path).splits.values()] == [6, 2]
    assert [len(s) for s in open_data(f"webdataset:{tmp_path}/*.tar").splits.values()] == [6, 2]


def test_names_of_classes_from_a_file_from_text_and_from_json(write, tmp_path):
    write("train.tar", samples([0, 1] * 5))
    (tmp_path / "classes.txt").write_text("Katze\nHündin\n", encoding="utf-8")
    assert open_data(f"webdataset:{tmp_path}").classes == ["Katze", "Hündin"]
    (tmp_path / "classes.txt").unlink()
    write("train.tar", samples(["dog", "cat"] * 5))
    source = open_data(f"webdataset:{tmp_path}/train.tar")
    assert source.classes == ["cat", "dog"]
    members = [
        pair
        for i in range(10)
        for pair in ((f"a/{i}.seg.png", "?"), (f"a/{i}.PNG", True), (f"a/{i}.json", f'{{"label": {i % 2}}}'))
    ]
    write("train.tar", [("__empty", ""), ("._0.jpg", "?"), *members])
    source = open_data(f"webdataset:{tmp_path}/train.tar")
    assert source.classes == ["0", "1"]
    assert source.splits["train"][0].image.size == (20, 16)


def test_a_sample_without_a_picture_or_with_a_damaged_one_is_bad(write, tmp_path):
    members = [*samples([0, 1] * 5), ("x.cls", 0), ("y.jpg", "no picture"), ("y.cls", 1)]
    write("train.tar", members)
    write("test.tar", samples([0, 1]))
    train = open_data(tmp_path).splits["train"]
    assert len(train) == 12
    with pytest.raises(BadSample, match=r"train\.tar:x: the sample has no picture"):
        train[10]
    with pytest.raises(BadSample, match=r"train\.tar:y: not a picture"):
        train[11]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", True), ("1.jpg", True), ("1.cls", 1)], r"train\.tar:0: no label; takes a member \.cls"),
        ([("0.jpg", True), ("0.json", "{")], r"train\.tar:0\.json: not a label: "),
        ([("0.jpg", True), ("0.json", "[1]")], r"train\.tar:0\.json: not a label: "),
        ([("0.jpg", True), ("0.json", json.dumps({"label": None}))], r"train\.tar:0: no label"),
        (samples([0, 2, 0, 2]), "1 of 3 classes without a training image: '1'"),
        (samples([0, 900]), "labels run to 900 in 2 samples"),
        (samples([0, -1, 1]), r"train\.tar:0001: label -1 is none of the 2 classes"),
        ([], "no training images"),
    ],
)
def test_what_cannot_be_trained_on_is_one_clear_line(write, tmp_path, members, message):
    write("train.tar", members)
    with pytest.raises(ValueError, match=message) as caught:
        open_data(f"webdataset:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_an_unknown_label_of_the_test_split(write, tmp_path):
    write("train.tar", samples(["cat", "dog"]))
    write("test.tar", samples(["cat", "fox"]))
    with pytest.raises(ValueError, match=r"test\.tar:0001: unknown label 'fox'; the classes are cat, dog"):
        open_data(tmp_path)


def test_shards_that_cannot_be_read(write, tmp_path):
    path = write("train.tar", samples([0, 1] * 5))
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) // 2 + 300, 3 * 512 + 100, 3 * 512, 1024, 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train\.tar: damaged, cut off, or not"):
            open_data(f"webdataset:{path}")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="not an uncompressed tar file"):
        open_data(f"webdataset:{path}")
    for pattern in ("https://host/train-000.tar", "pipe:cat x.tar", "s3://bucket/a.tar"):
        with pytest.raises(ValueError, match="remote shards are not read"):
            open_data(f"webdataset:{pattern}")
    with pytest.raises(FileNotFoundError, match=r"no shard .*train-001\.tar"):
        open_data(f"webdataset:{tmp_path}/train-{{001..002}}.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.tar file"):
        open_data(f"webdataset:{tmp_path}/empty")


def test_the_positions_are_those_of_the_pictures(write, tmp_path, encoded):
    long = "d" * 120  # longer than a plain tar header holds
    write("train.tar", [(f"{long}/0.jpg", True), (f"{long}/0.cls", 0), ("1.jpg", True), ("1.cls", 1)])
    write("test.tar", samples([0, 1]))
    train = open_data(tmp_path).splits["train"]
    assert train.read(0) == encoded("JPEG", 0)
    assert train.read(1) == encoded("JPEG", 2)
    assert np.array_equal(train.labels, [0, 1])
