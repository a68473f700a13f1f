"""Folders of pictures and label maps: layouts, what the values mean, and what can be wrong."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from PIL import Image

from coterie.data import BadSample, Loader, TooManyBadSamples, TransformConfig, build_pipeline, open_data
from coterie.data.annotations import IGNORE
from coterie.data.maps import CITYSCAPES

SIZE = 12, 16
"""Height and width."""


def values(seed, highest=3, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, highest + 1, SIZE).astype(dtype)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def pair(tmp_path):
    """Writes a picture and its label map below the folder of the set: pair("images/1.png", "labels/1.png", values)."""

    def write(image, label, pixels=None, seed=0):
        save(tmp_path / image, np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        save(tmp_path / label, values(seed) if pixels is None else pixels)

    return write


def fill(pair, image="images/{split}/{number}.png", label="labels/{split}/{number}.png", maps=None, splits=None):
    for split, count in (splits or {"train": 4, "val": 2}).items():
        for number in range(count):
            pixels = None if maps is None else maps(number)
            pair(image.format(split=split, number=number), label.format(split=split, number=number), pixels, number)


def opened(root, options=""):
    return open_data(f"maps:{root}{options}", target="label_map")


@pytest.mark.parametrize(
    ("image", "label", "splits"),
    [
        ("{split}/{number}.png", "{split}annot/{number}.png", ("train", "val")),
        ("{split}/{number}.png", "{split}_labels/{number}_L.png", ("train", "val")),
        ("images/{split}/{number}.jpg", "labels/{split}/{number}.png", ("train", "val")),
        ("images/{split}/{number}.jpg", "annotations/{split}/{number}.png", ("training", "validation")),
        ("{split}/images/{number}.png", "{split}/masks/{number}.png", ("train", "test")),
        ("images/{split}/a/b/{number}.png", "masks/{split}/a/b/{number}_mask.png", ("train", "test")),
        ("leftImg8bit/{split}/ulm/u_{number}_leftImg8bit.png", "gtFine/{split}/ulm/u_{number}_x.png", None),
        ("images/{number}.png", "labels/{number}_P.png", None),
    ],
)
def test_the_layouts_in_use(tmp_path, pair, image, label, splits):
    if splits is None:
        label = label.replace("_x.png", "_gtFine_labelTrainIds.png")
        fill(pair, image, label, splits={"train": 12})
        source = open_data(tmp_path, target="label_map")
        counts = {"train": 11, "test": 1}
    else:
        fill(pair, image, label, splits=dict(zip(splits, (4, 2), strict=True)))
        source = open_data(tmp_path, target="label_map")
        counts = {"train": 4, "test": 2}
    assert {key: len(split) for key, split in source.splits.items()} == counts
    assert source.native_size == SIZE
    sample = source.splits["train"][0]
    number = int(sample.name.rsplit("/", 1)[1].removeprefix("u_").split("_")[0].split(".")[0])
    assert np.array_equal(sample.label, values(number))
    expected = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert np.abs(np.asarray(sample.image).astype(int) - expected).mean() < (90 if ".jpg" in image else 1)


def test_classes_by_number_name_and_file(tmp_path, pair):
    fill(pair)
    assert opened(tmp_path).classes == ["0", "1", "2", "3"]
    (tmp_path / "classes.txt").write_text("sky\nroad\n\ntree\ncar\n")
    assert opened(tmp_path).classes == ["sky", "road", "tree", "car"]
    (tmp_path / "classes.json").write_text(json.dumps(["sky", "Void", "tree", "car"]))
    source = opened(tmp_path)
    assert source.classes == ["sky", "tree", "car"]
    expected = np.array([0, IGNORE, 1, 2], dtype=np.uint8)[values(0)]
    assert np.array_equal(source.splits["train"].target(0), expected)
    for ignore in ("car", "3", "car,3"):
        assert opened(tmp_path, f"?ignore={ignore}").classes == ["sky", "tree"]
    with pytest.raises(ValueError, match="ignore: no class 'boat'; the classes are sky, Void, tree, car"):
        opened(tmp_path, "?ignore=boat")
    for content, message in (("{", "not a json file"), ("[1]", "takes a list of names")):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(ValueError, match=rf"classes\.json: {message}"):
            opened(tmp_path)


def test_the_camvid_tutorial_ignores_what_it_is_told_to(tmp_path, pair):
    fill(pair, "{split}/{number}.png", "{split}annot/{number}.png", lambda number: values(number, 11))
    source = opened(tmp_path, "?ignore=11")
    assert source.classes == [str(value) for value in range(11)]
    assert (source.splits["train"].target(1) == IGNORE).sum() == (values(1, 11) == 11).sum() > 0


def test_ade20k(tmp_path, pair):
    fill(
        pair,
        "images/{split}/ADE_{number}.jpg",
        "annotations/{split}/ADE_{number}.png",
        lambda number: values(number, 150),
        {"training": 2, "validation": 1},
    )
    names = [f"{number}\t0.1\t5\t5\tthing {number}, matter" for number in range(1, 151)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *names]) + "\n")
    source = opened(tmp_path)
    assert (len(source.classes), source.classes[0], source.classes[-1]) == (150, "thing 1", "thing 150")
    expected = values(0, 150).astype(int) - 1
    expected[expected < 0] = IGNORE
    assert np.array_equal(source.splits["train"].target(0), expected)


def test_cityscapes(tmp_path, pair):
    for split, count in {"train": 3, "val": 1, "test": 2}.items():
        for number in range(count):
            name = f"{split}/ulm/ulm_{number}"
            ids = np.zeros(SIZE, dtype=np.uint8) if split == "test" else values(number, 33)
            pair(f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_labelIds.png", ids)
            save(tmp_path / f"gtFine/{name}_gtFine_color.png", np.zeros((*SIZE, 4), dtype=np.uint8))
            save(tmp_path / f"gtFine/{name}_gtFine_instanceIds.png", values(1, 999, np.uint16))
    source = opened(tmp_path)
    assert source.classes == list(CITYSCAPES)
    assert {key: len(split) for key, split in source.splits.items()} == {"train": 3, "test": 1}  # test is withheld
    ids, labels = values(2, 33), source.splits["train"].target(2)
    for identity, name in ((7, "road"), (26, "car"), (33, "bicycle"), (24, "person")):
        assert (labels[ids == identity] == CITYSCAPES.index(name)).all()
    for identity in (0, 6, 9, 29):
        assert (labels[ids == identity] == IGNORE).all()


@pytest.mark.parametrize("table", ["class_dict.csv", "label_colors.txt"])
def test_colours(tmp_path, pair, table):
    palette = {"Sky": (128, 128, 128), "Road": (128, 64, 128), "Void": (0, 0, 0)}
    colours = np.array(list(palette.values()), dtype=np.uint8)
    fill(pair, "{split}/{number}.png", "{split}_labels/{number}_L.png", lambda number: colours[values(number, 2)])
    with pytest.raises(ValueError, match=r"a label map in colours; put a class_dict\.csv"):
        opened(tmp_path)
    if table == "class_dict.csv":
        lines = ["name,r,g,b", *(f"{name},{r},{g},{b}" for name, (r, g, b) in palette.items())]
    else:
        lines = [f"{r} {g} {b}\t\t{name}" for name, (r, g, b) in palette.items()]
    (tmp_path / table).write_text("\n".join(lines))
    source = opened(tmp_path)
    assert source.classes == ["Sky", "Road"]
    assert np.array_equal(source.splits["train"].target(1), np.array([0, 1, IGNORE])[values(1, 2)])
    odd = colours[values(1, 2)]
    odd[4, 7] = 1, 2, 3
    save(tmp_path / "train_labels" / "1_L.png", odd)
    with pytest.raises(BadSample, match=r"1_L\.png: colour \(1, 2, 3\) at row 4, column 7 stands for no class"):
        source.splits["train"].target(1)
    save(tmp_path / "train_labels" / "1_L.png", values(1))
    with pytest.raises(BadSample, match="the label map is not in colours"):
        source.splits["train"].target(1)


def test_black_and_white_maps_have_two_classes(tmp_path, pair):
    fill(pair, maps=lambda number: values(number, 1) * 255)
    for names in (None, ["tile", "crack"]):
        if names:
            (tmp_path / "classes.json").write_text(json.dumps(names))
        source = opened(tmp_path)
        assert source.classes == (names or ["background", "foreground"])
        assert np.array_equal(source.splits["train"].target(1), values(1, 1))


def test_palette_one_bit_and_16_bit_maps(tmp_path, pair):
    fill(pair, maps=lambda number: values(number, 1))
    image = Image.fromarray(values(0, 1), "P")
    image.putpalette([200, 10, 10, 10, 200, 10])
    image.save(tmp_path / "labels/train/0.png")
    Image.fromarray(values(1, 1).astype(bool)).save(tmp_path / "labels/train/1.png")
    wide = values(2, 1, np.uint16)
    wide[0, :] = 65535
    save(tmp_path / "labels/train/2.png", wide)
    train = opened(tmp_path).splits["train"]
    assert np.array_equal(train.target(0), values(0, 1))
    assert np.array_equal(train.target(1), values(1, 1))
    assert (train.target(2)[0] == IGNORE).all()
    assert np.array_equal(train.target(2)[1:], values(2, 1)[1:])


def test_a_map_that_does_not_fit_is_a_bad_sample(tmp_path, pair):
    (tmp_path / "classes.json").write_text(json.dumps(["a", "b", "c", "d"]))
    fill(pair, splits={"train": 40, "val": 2})
    wrong = values(3)
    wrong[5, 6] = 4
    wide = values(4, 3, np.uint16)
    wide[0, 1] = 300
    places = [tmp_path / f"labels/train/{number}.png" for number in range(10)]
    save(places[3], wrong)
    save(places[4], wide)
    save(places[5], values(5)[:, :-1])
    places[6].write_bytes(b"nothing")
    places[7].write_bytes(places[7].read_bytes()[:60])
    save(places[8], np.zeros((*SIZE, 4), dtype=np.uint8))
    source = opened(tmp_path)
    pipeline = build_pipeline(source, TransformConfig(mean=(0.5,) * 3, std=(0.5,) * 3))
    loader = Loader(source.splits["train"], pipeline, 40, max_bad_share=0.2)
    (batch,) = loader.batches(0)
    assert batch["label_map"][batch["label_map"] != IGNORE].max() == 3
    reasons = {
        name.rsplit("labels/train/", 1)[-1].rsplit("images/train/", 1)[-1]: why for name, why in loader.bad.items()
    }
    assert len(reasons) == 6
    assert reasons["3.png"].startswith("label value 4 at row 5, column 6 is none of the 4 classes, takes 0 to 3")
    assert reasons["4.png"] == "label value 300 is none of the 4 classes"
    assert reasons["5.png"] == "the picture is 16x12, its annotation says 15x12"
    assert reasons["6.png"] == "not a picture in any format Pillow reads"
    assert reasons["7.png"].startswith("not a label map:")
    assert reasons["8.png"] == "the label map is in colours, and no file says which colour is which class"
    with pytest.raises(TooManyBadSamples, match="5 of 40 images cannot be read"):
        list(Loader(source.splits["train"], pipeline, 40, max_bad_share=0.1).batches(0))


def test_a_picture_without_a_map_and_a_map_without_a_picture(tmp_path, pair, caplog):
    fill(pair, splits={"train": 200, "val": 2})
    (tmp_path / "labels/train/7.png").unlink()
    (tmp_path / "images/train/9.png").unlink()
    assert len(opened(tmp_path).splits["train"]) == 198
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines[0].startswith(f"skipped {tmp_path}/images/train/7.png: no label map of that name in")
    assert lines[1].startswith(f"skipped {tmp_path}/labels/train/9.png: a label map without a picture in")
    (tmp_path / "labels/train/8.png").unlink()
    with pytest.raises(ValueError, match="3 of 200 annotations cannot be used"):
        opened(tmp_path)


def test_other_mistakes_are_named(tmp_path, pair):
    with pytest.raises(FileNotFoundError, match="maps:nowhere: no such folder"):
        opened("nowhere")
    with pytest.raises(ValueError, match=r"no folders of pictures and label maps; takes train \+ trainannot"):
        opened(tmp_path)
    fill(pair, splits={"val": 2})
    with pytest.raises(ValueError, match="no training images, only validation"):
        opened(tmp_path)
    (tmp_path / "images/train").mkdir()
    (tmp_path / "labels/train").mkdir()
    with pytest.raises(ValueError, match="images/train: no pictures"):
        opened(tmp_path)
    fill(pair, maps=lambda number: np.full(SIZE, IGNORE, dtype=np.uint8))
    with pytest.raises(ValueError, match="label values run to -1"):
        opened(tmp_path)


@pytest.mark.parametrize("count", [2, 5])
def test_few_pictures_without_a_split_hold_one_out(pair, tmp_path, count):
    for number in range(count):
        pair(f"images/{number}.png", f"labels/{number}.png", seed=number)
    splits = opened(tmp_path).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": count - 1, "test": 1}


def test_one_picture_is_too_few(pair, tmp_path):
    pair("images/0.png", "labels/0.png")
    with pytest.raises(ValueError, match="1 images and no test split: too few to hold any out"):
        opened(tmp_path)
