"""The readers on real sets: CIFAR-10, Tiny-ImageNet and photographs of clothes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coterie.data import Loader, TransformConfig, build_transforms, open_data


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
