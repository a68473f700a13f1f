"""Image folders: layouts, names, links, and every way in which one can be wrong."""

from __future__ import annotations

import os
import unicodedata

import numpy as np
import pytest

from coterie.data import BadSample, open_data


def counts(source, split):
    return np.bincount(source.splits[split].labels, minlength=len(source.classes)).tolist()


def test_train_and_test_folders(image_folder):
    root = image_folder({"train/dog": 3, "train/cat": 4, "test/cat": 1, "test/dog": 2})
    source = open_data(f"folder:{root}")
    assert source.classes == ["cat", "dog"]
    assert (counts(source, "train"), counts(source, "test")) == ([4, 3], [1, 2])
    assert (source.channels, source.native_size, source.mirror) == (3, (16, 20), True)
    image, label, name = source.splits["train"][0]
    assert (image.mode, image.size, label, name) == ("RGB", (20, 16), 0, f"{root}/train/cat/000.png")
    assert source.describe() == "pictures: 2 classes, 7 train, 3 test images, 20x16 RGB"


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev", "test", "TEST"])
def test_any_other_split_serves_as_test(image_folder, name):
    source = open_data(image_folder({"Train/a1": 2, "Train/b1": 2, f"{name}/a1": 1, f"{name}/b1": 1}))
    assert list(source.splits) == ["train", "test"]
    assert counts(source, "test") == [1, 1]


def test_validation_stays_apart_where_there_is_a_test_split_too(image_folder):
    source = open_data(
        image_folder({f"{split}/{name}": 2 for split in ("train", "val", "test") for name in ("ab", "cd")})
    )
    assert list(source.splits) == ["train", "validation", "test"]
    with pytest.raises(ValueError, match="both 'val' and 'valid' name the validation split"):
        open_data(image_folder({f"{s}/{c}": 1 for s in ("train", "val", "valid") for c in ("ab", "cd")}, "twice"))


def test_a_single_level_of_classes_holds_out_a_tenth_of_each(image_folder):
    root = image_folder({"cat": 20, "dog": 10, "one": 1})
    first, second = open_data(root), open_data(f"folder:{root}")
    assert (counts(first, "train"), counts(first, "test")) == ([18, 9, 1], [2, 1, 0])
    names = [{split.name(i) for i in range(len(split))} for split in first.splits.values()]
    assert not names[0] & names[1]
    assert [second.splits["test"].name(i) for i in range(3)] == [first.splits["test"].name(i) for i in range(3)]


def test_classes_may_be_called_train_and_test(image_folder):
    source = open_data(image_folder({"train": 3, "test": 3, "bus": 3}))
    assert source.classes == ["bus", "test", "train"]


def test_pictures_in_folders_below_the_class_count(image_folder):
    source = open_data(image_folder({"cat/a/b": 6, "dog": 5}))
    assert counts(source, "train")[0] + counts(source, "test")[0] == 6


def test_other_files_and_hidden_ones_are_passed_over(image_folder):
    root = image_folder({"cat": 5, "dog": 5})
    for name in ("notes.txt", "Thumbs.db", "._000.png", ".DS_Store"):
        (root / "cat" / name).write_text("no picture")
    (root / "README.md").write_text("not a class")
    (root / ".git").mkdir()
    source = open_data(root)
    assert source.classes == ["cat", "dog"]
    assert sum(len(split) for split in source.splits.values()) == 10


def test_links_are_followed_once_and_a_broken_one_is_a_bad_sample(image_folder, tmp_path):
    root = image_folder({"cat": 5, "dog": 5})
    store = image_folder({"birds": 6}, "store")
    (root / "bird").symlink_to(store / "birds", target_is_directory=True)
    (root / "cat" / "loop").symlink_to(root / "cat", target_is_directory=True)
    (root / "dog" / "link.png").symlink_to(root / "dog" / "000.png")
    (root / "dog" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    source = open_data(root)
    assert source.classes == ["bird", "cat", "dog"]
    assert [counts(source, "train")[i] + counts(source, "test")[i] for i in range(3)] == [6, 5, 7]
    lost = [(s, i) for s in source.splits.values() for i in range(len(s)) if s.name(i).endswith("lost.png")]
    with pytest.raises(BadSample, match=r"lost\.png: No such file"):
        lost[0][0][lost[0][1]]


def test_unicode_names_match_composed_or_not(image_folder):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    source = open_data(image_folder({f"train/{composed}": 2, "train/猫 🐈": 2, f"test/{decomposed}": 1}))
    assert source.classes == ["café", "猫 🐈"]
    assert counts(source, "test") == [1, 0]
    assert source.splits["test"][0].label == 0


def test_names_that_are_no_unicode_are_readable(image_folder):
    root = image_folder({"cat": 5, "dog": 5})
    os.rename(root / "dog", os.fsencode(root) + b"/d\xf6g")
    source = open_data(root)
    assert source.classes == ["cat", "d\\xf6g"]
    assert source.splits["train"][len(source.splits["train"]) - 1].name.encode()


def test_digits_and_letters_are_not_mirrored(image_folder):
    assert not open_data(image_folder({"b": 3, "d": 3, "10": 3})).mirror


def test_a_test_folder_without_labels_is_left_out(image_folder, caplog):
    root = image_folder({"train/cat": 10, "train/dog": 10, "test": 3})
    assert counts(open_data(root), "test") == [1, 1]
    assert "no class folders" in caplog.text


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"cat": 3, "dog": 0}, r"class 'dog' has no images; remove the folder or fill it"),
        ({"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/dgo": 1}, r"unknown label 'dgo'.*closest: 'dog'"),
        ({"cat": 3}, r"one class only \('cat'\); takes at least two"),
        ({"cat": 1, "dog": 1}, r"too few to hold any out"),
        ({"test/cat": 1, "val/cat": 1}, r"no training images: no folder 'train'"),
        ({"train": 3, "test": 3}, r"no training images: .*train has no class folders"),
        ({".": 3}, r"no class folders \(and 3 images outside of any\)"),
        ({"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/dog": 0}, r"class 'dog' has no images"),
    ],
)
def test_what_cannot_be_trained_on_is_one_clear_line(image_folder, layout, message):
    root = image_folder({place: count for place, count in layout.items() if place != "."})
    for index in range(layout.get(".", 0)):
        root.mkdir(exist_ok=True)
        (root / f"{index}.png").write_bytes(b"?")
    with pytest.raises(ValueError, match=message) as caught:
        open_data(f"folder:{root}")
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value) or root.name in str(caught.value)


def test_a_class_of_other_files_says_what_they_are(image_folder):
    root = image_folder({"cat": 3, "dog": 0})
    (root / "dog" / "a.pdf").write_text("")
    with pytest.raises(ValueError, match=r"class 'dog' has no images \(only 1 files of kind \.pdf\)"):
        open_data(root)


def test_a_missing_folder_and_a_file_in_its_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_data(f"folder:{tmp_path}/gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_data(f"folder:{tmp_path}/file")


def test_a_set_of_unreadable_pictures_is_refused_before_training(image_folder):
    root = image_folder({"cat": 3, "dog": 3})
    for file in root.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match=r"none of the training images looked at can be read, the first: .*\.png: not a pic"
    ):
        open_data(root)
