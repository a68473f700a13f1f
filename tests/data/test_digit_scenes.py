"""The embedded dense set: exact, the same everywhere, and its splits apart."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from PIL import Image

from coterie.data import open_data


@pytest.fixture(scope="module")
def scenes():
    return open_data("digit-scenes", target="instances")


@pytest.fixture(scope="module")
def maps():
    return open_data("digit-scenes", target="label_map")


def test_the_set(scenes, maps):
    assert scenes.describe() == "digit-scenes: 10 classes, 1,000 train, 200 test images with masks, 128x128 RGB"
    assert maps.describe() == "digit-scenes: 11 classes, 1,000 train, 200 test images with label maps, 128x128 RGB"
    assert maps.classes == ["background", *scenes.classes]
    assert not scenes.mirror
    small = open_data("digit-scenes", target="label_map", image_size=(64, 96)).splits["test"]
    assert small.image(3).size == (96, 64)
    assert small.target(3).shape == (64, 96)


def test_boxes_masks_and_label_maps_are_exact(scenes, maps):
    counts = []
    for index in range(60):
        found, labels = scenes.splits["train"].target(index), maps.splits["train"].target(index)
        masks = found.decode()
        counts.append(len(found))
        assert masks.sum(0).max(initial=0) <= 1  # later digits cover earlier ones
        for box, label, area, mask in zip(found.boxes, found.labels, found.area, masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert area == mask.sum()
            assert (labels[mask == 1] == label + 1).all()
        assert ((labels > 0) & ~masks.any(0)).sum() < 8  # a digit of which next to nothing is left has no instance
    assert 2.5 < np.mean(counts) < 4.5


def test_the_ink_is_where_the_mask_says(scenes):
    contrast = []
    for index in range(40):
        sample = scenes.splits["test"][index]
        pixels = np.asarray(sample.image, dtype=float).mean(2)
        for box, mask in zip(sample.label.boxes.astype(int), sample.label.decode(), strict=True):
            part = np.s_[box[1] : box[3], box[0] : box[2]]
            if (mask[part] == 0).any():
                contrast.append(abs(pixels[part][mask[part] == 1].mean() - pixels[part][mask[part] == 0].mean()))
    assert np.mean(contrast) > 50
    assert np.mean(np.array(contrast) > 10) > 0.9


def test_every_digit_occurs_in_every_split(scenes):
    for split in scenes.splits.values():
        labels = np.concatenate([split.target(index).labels for index in range(150)])
        assert np.bincount(labels, minlength=10).min() >= 15


def test_a_scene_is_a_function_of_its_split_and_number(scenes):
    again = open_data("digit-scenes", target="instances")
    for split in ("train", "test"):
        for index in (199, 0, 7):
            one, other = scenes.splits[split][index], again.splits[split][index]
            assert np.array_equal(one.image, other.image)
            assert np.array_equal(one.label.boxes, other.label.boxes)
    assert not np.array_equal(scenes.splits["train"].image(0), scenes.splits["test"].image(0))
    copied = pickle.loads(pickle.dumps(scenes.splits["test"]))
    assert np.array_equal(copied.image(5), scenes.splits["test"].image(5))


def test_the_splits_show_other_digits_and_other_places(scenes):
    train, test = scenes.splits["train"], scenes.splits["test"]
    known = {digit.tobytes() for digit in train.digits}
    assert not any(digit.tobytes() in known for digit in test.digits)
    for one, other in zip(train.photographs, test.photographs, strict=True):
        assert isinstance(one, Image.Image)
        assert one.width + other.width == 640
        assert one.height == other.height == 427
