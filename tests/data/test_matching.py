"""A set read with the class numbers of another."""

from __future__ import annotations

import numpy as np
import pytest

from coterie.data import IGNORE, Loader, TransformConfig, build_pipeline, match_classes, open_data


def test_instances_are_renumbered(coco_folder):
    box = {"bbox": [2, 3, 10, 8], "category_id": 3}
    source = open_data(coco_folder(train=[[box, {**box, "category_id": 7}]] * 2, val=[[box]]), target="instances")
    assert match_classes(source, ["cat", "dog"]) is source
    matched = match_classes(source, ["cow", "dog", "cat"])
    assert (matched.classes, matched.target) == (["cow", "dog", "cat"], "instances")
    train = matched.splits["train"]
    assert train.target(0).labels.tolist() == [2, 1]
    assert (train.name(0), train.image(0).size, train.header(0)) == (
        source.splits["train"].name(0),
        (20, 16),
        (16, 20, False),
    )
    (batch,) = Loader(train, build_pipeline(matched, TransformConfig(), train=False), 2).batches(0, train=False)
    assert batch["truth"][1]["labels"].tolist() == [2, 1]
    with pytest.raises(ValueError, match="coco has classes that the run was not trained on: dog; it knows cat, cow"):
        match_classes(source, ["cat", "cow"])


def test_label_maps_are_renumbered():
    source = open_data("digit-scenes", target="label_map")
    labels = source.splits["test"].target(0)
    matched = match_classes(source, ["nothing", *reversed(source.classes)])
    assert np.array_equal(matched.splits["test"].target(0), 11 - labels)
    assert IGNORE not in matched.splits["test"].target(0)


def test_classes_are_renumbered():
    source = open_data("digits")
    matched = match_classes(source, list("9876543210"))
    assert np.array_equal(matched.splits["test"].labels, 9 - source.splits["test"].labels)
    assert matched.splits["test"][3].label == 9 - source.splits["test"][3].label
