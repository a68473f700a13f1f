"""What a person types, the digits, and the checks that every source goes through."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from coterie.data import open_data
from coterie.data.opening import check_size, parse_spec
from coterie.data.source import stratified_split


@pytest.mark.parametrize(
    ("spec", "meaning"),
    [
        ("digits", ("digits", "", {})),
        ("folder:/a?b=c", ("folder", "/a?b=c", {})),
        ("parquet:a b.parquet", ("parquet", "a b.parquet", {})),
        ("hf:cifar100?label=fine_label&image=img", ("hf", "cifar100", {"label": "fine_label", "image": "img"})),
        ("webdataset:x-{000..010}.tar", ("webdataset", "x-{000..010}.tar", {})),
    ],
)
def test_a_spec_is_a_kind_and_a_place(spec, meaning):
    assert parse_spec(spec) == meaning


@pytest.mark.parametrize("spec", ["mnist", "", "foldr:/tmp", "/no/such/folder", "hf:", "folder:"])
def test_an_unknown_spec_says_what_there_is(spec):
    with pytest.raises(ValueError, match=r"takes digits, folder:PATH, parquet:PATH, hf:NAME, webdataset:PATTERN"):
        open_data(spec)


def test_a_spec_is_text():
    with pytest.raises(TypeError, match="spec: got int, takes text"):
        open_data(3)


def test_a_bare_folder_is_guessed(tmp_path):
    for name, kind in (("a.parquet", "parquet"), ("b.tar", "webdataset"), ("c/d.png", "folder")):
        folder = tmp_path / kind
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"")
        assert parse_spec(str(folder))[0] == kind
    assert parse_spec(str(tmp_path / "parquet" / "a.parquet"))[0] == "parquet"


def test_sizes():
    assert [check_size(size) for size in (None, 5, (3, 4), [3, 4])] == [None, (5, 5), (3, 4), (3, 4)]
    for wrong in (0, -1, (3,), (3, 0), "32", (1.5, 2)):
        with pytest.raises(ValueError, match="image_size: got"):
            check_size(wrong)


def test_the_digits():
    source = open_data("digits")
    train, test = source.splits["train"], source.splits["test"]
    assert source.classes == list("0123456789")
    assert (source.channels, source.native_size, source.mirror, source.background) == (1, (32, 32), False, 0)
    assert len(train) + len(test) == 1797
    assert not {train.name(i) for i in range(len(train))} & {test.name(i) for i in range(len(test))}
    for split in (train, test):
        share = np.bincount(split.labels) / len(split)
        assert np.abs(share - 0.1).max() < 0.01
    assert [test.name(index) for index in range(3)] == ["digits row 1", "digits row 4", "digits row 18"]
    # Drawn larger, but the same digits: averaged back they are what scikit-learn has.
    from sklearn.datasets import load_digits

    original = load_digits().images[test.rows] * (255 / 16)
    drawn = np.stack([np.asarray(test[index].image) for index in range(len(test))])
    assert np.abs(drawn.reshape(-1, 8, 4, 8, 4).mean((2, 4)) - original).mean() < 12
    assert open_data("digits", image_size=(24, 40)).splits["train"][0].image.size == (40, 24)


def test_statistics_are_those_of_the_pixels():
    source = open_data("digits")
    train = source.splits["train"]
    pixels = np.stack([np.asarray(train[index].image) for index in range(len(train))]) / 255
    (mean,), (std,) = source.statistics()
    assert abs(mean - pixels.mean()) < 0.005
    assert abs(std - pixels.std()) < 0.005
    assert source.statistics() is source.statistics()
    assert source.statistics(3)[0] == (mean,) * 3


def test_grey_pictures_are_noticed_and_a_single_colour_one_makes_a_set_colour(image_folder, encoded):
    root = image_folder({"cat": 10, "dog": 10})
    for seed, file in enumerate(sorted(root.rglob("*.png"))):
        file.write_bytes(encoded("PNG", seed, mode="L"))
    source = open_data(root)
    assert (source.channels, source.splits["test"][0].image.mode) == (1, "L")
    for file in root.glob("cat/*.png"):
        file.write_bytes(encoded("PNG"))
    source = open_data(root)
    assert (source.channels, source.splits["train"][len(source.splits["train"]) - 1].image.mode) == (3, "RGB")


def test_flat_pictures_have_a_spread_above_zero(image_folder):
    from PIL import Image

    root = image_folder({"cat": 5, "dog": 5})
    for file in root.rglob("*.png"):
        Image.new("RGB", (4, 4), (51, 0, 255)).save(file)
    mean, std = open_data(root).statistics()
    assert mean == (0.2, 0.0, 1.0)
    assert min(std) > 0


def test_a_stratified_split_never_takes_the_last_of_a_class():
    labels = np.repeat([0, 1, 2, 3], [100, 10, 5, 1])
    kept, held_out = stratified_split(labels, 0.1)
    assert np.bincount(labels[held_out], minlength=4).tolist() == [10, 1, 0, 0]
    assert sorted([*kept, *held_out]) == list(range(116))
    assert len(stratified_split(np.array([0, 1, 1]), 0.1)[1]) == 1


def test_indices_beyond_the_end_are_an_index_error():
    test = open_data("digits").splits["test"]
    assert test[-1].name == test[len(test) - 1].name
    with pytest.raises(IndexError, match="index: got 400, takes -3"):
        test[400]


def test_opening_says_nothing_when_all_is_well(caplog):
    with caplog.at_level(logging.INFO):
        open_data("digits")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("spec", "target", "message"),
    [
        ("digit-scenes", "class", "has no classes of whole pictures, only label maps; takes digits, folder:PATH"),
        ("digits", "instances", "has no boxes, only classes of whole pictures; takes digit-scenes, coco:PATH"),
        ("coco:x", "label_map", "has no label maps, only boxes"),
        ("maps:x", "instances", "has no boxes, only label maps"),
        ("nowhere", "instances", "no such source and no such folder; takes digit-scenes, coco:PATH, voc:PATH"),
        ("coco:", "instances", "nothing after the colon"),
        ("maps:x?label=y", "label_map", "unknown option 'label'; takes ignore"),
        ("digits", "boxes", "target: got 'boxes', takes class, label_map, instances"),
    ],
)
def test_what_does_not_have_the_target_says_so(spec, target, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        open_data(spec, target=target)
