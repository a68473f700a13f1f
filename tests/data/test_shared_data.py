"""The readers on real sets: CIFAR-10, Tiny-ImageNet, photographs of clothes; and five dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coterie.data import IGNORE, Loader, TransformConfig, build_pipeline, build_transforms, open_data


@pytest.mark.parametrize(
    ("name", "description", "classes"),
    [
        ("cifar10", "cifar10: 10 classes, 50,000 train, 10,000 test images, 32x32 RGB", ("airplane", "truck")),
        (
            "tiny_imagenet_20",
            "tiny_imagenet_20: 20 classes, 10,000 train, 1,000 test images, 64x64 RGB",
            ("Egyptian cat", "organ"),
        ),
        (
            "clothing_small_160",
            "clothing_small_160: 10 classes, 3,068 train, 341 validation, 372 test images, 160x213 RGB",
            ("dress", "t-shirt"),
        ),
    ],
)
def test_a_real_set(shared_data, name, description, classes):
    source = open_data(shared_data / name)
    assert source.describe() == description
    assert (source.classes[0], source.classes[-1]) == classes
    mean, std = source.statistics()
    assert 0.3 < min(mean) < max(mean) < 0.7
    assert 0.15 < min(std) < max(std) < 0.35
    if name == "cifar10":  # the figures that everybody uses
        assert np.abs(np.subtract(mean, (0.4914, 0.4822, 0.4465))).max() < 0.01
        assert np.abs(np.subtract(std, (0.2470, 0.2435, 0.2616))).max() < 0.01
    for split, train in (("train", True), ("test", False)):
        transform = build_transforms(source, TransformConfig(image_size=64), train)
        loader = Loader(source.splits[split], transform, 32, cache=False)
        batch = next(loader.batches(0, train=train))
        assert batch["image"].shape == (32, 3, 64, 64)
        assert batch["image"].isfinite().all()
        assert abs(float(batch["image"].mean())) < 0.7
        assert torch.equal(batch["label"], torch.from_numpy(source.splits[split].labels[batch["index"].numpy()]))
        assert not loader.bad


def test_sets_that_are_no_classified_pictures_say_so(shared_data):
    for name, message in (
        ("adult", "no image column found; the columns are age, workclass"),
        ("camvid", "no label column found|label column 'label'"),
        ("magnetic_tile", "classes without a training image"),
    ):
        with pytest.raises(ValueError, match=message):
            open_data(shared_data / name)


@pytest.mark.parametrize(
    ("name", "target", "description", "objects"),
    [
        (
            "camvid",
            "label_map",
            "11 classes, 367 train, 101 validation, 233 test images with label maps, 480x360 RGB",
            0,
        ),
        ("bccd", "instances", "3 classes, 205 train, 87 validation, 72 test images with boxes, 640x480 RGB", 2804),
        ("penn_fudan", "instances", "1 classes, 120 train, 50 test images with masks, 479x381 RGB", 294),
        ("nuclei_256", "instances", "1 classes, 267 train, 67 test images with masks, 256x256 RGB", 7754),
        ("coco_mini", "instances", "80 classes, 80 train, 79 test images with masks, 320x214 RGB", 739),
    ],
)
def test_a_real_dense_set(shared_data, name, target, description, objects, caplog):
    source = open_data(shared_data / name, target=target)
    assert source.describe() == f"{name}: {description}"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    train = source.splits["train"]
    if target == "instances":
        assert len(train.object_labels) == objects
    for train_mode, split in ((True, "train"), (False, "test")):
        pipeline = build_pipeline(source, TransformConfig(), train=train_mode, masks=source.has_masks)
        loader = Loader(source.splits[split], pipeline, 8, cache=False)
        batch = next(loader.batches(0, train=train_mode))
        assert not loader.bad
        assert batch["image"].isfinite().all()
        assert batch["image"].abs().max() < 30
        if target == "label_map":
            maps = [batch["label_map"]] if train_mode else batch["truth"]
            seen = torch.cat([labels.flatten() for labels in maps]).bincount(minlength=256)
            assert seen[11:IGNORE].sum() == 0
            assert (seen[:11] > 0).sum() >= 9
            # Road and sky are the largest classes of such scenes: the names are at the right numbers.
            assert {source.classes[label] for label in seen[:11].topk(4).indices} & {"Road", "Sky", "Building"}
        for found in batch["instances" if train_mode else "truth"] if target == "instances" else ():
            assert ((found["boxes"][:, 2:] - found["boxes"][:, :2]) > 0).all()
            assert len(found.get("masks", found["labels"])) == len(found["boxes"]) == len(found["labels"])
            assert all(0 <= label < len(source.classes) for label in found["labels"].tolist())


def test_every_mask_of_a_real_set_fills_its_box(shared_data):
    for name, share in (("penn_fudan", 0.999), ("nuclei_256", 0.99), ("coco_mini", 0.9)):
        split = open_data(shared_data / name, target="instances").splits["test"]
        close = []
        for index in range(len(split)):
            found = split.target(index)
            for box, mask in zip(found.boxes, found.decode(), strict=True):
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                tight = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
                close.append(np.abs(box - tight).max() <= 2)
        assert np.mean(close) >= share, name


def test_a_dense_set_opened_for_another_task_says_so(shared_data):
    with pytest.raises(ValueError, match=r"has no label maps, only boxes; takes digit-scenes, maps:PATH"):
        open_data(f"coco:{shared_data / 'bccd'}", target="label_map")
    with pytest.raises(ValueError, match="no label column found; the columns are image, label, id"):
        open_data(shared_data / "camvid", target="instances")
