"""From a picture to a tensor."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.data import TransformConfig, build_transforms, open_data
from coterie.data.randomness import seed_everything
from coterie.data.transforms import _ShiftReflected, settle


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


@pytest.fixture
def photos(image_folder):
    return open_data(image_folder({"cat": 5, "dog": 5}))


def test_what_is_left_open_is_settled_by_the_source(digits, photos):
    config = settle(digits, TransformConfig())
    assert (config.image_size, config.channels, config.crop, config.hflip, config.fill) == ((32, 32), 1, "none", 0.0, 0)
    assert (config.mean, config.std) == digits.statistics()
    config = settle(photos, TransformConfig(image_size=16))
    assert (config.image_size, config.channels, config.crop, config.hflip) == ((16, 16), 3, "pad", 0.5)
    config = settle(photos, TransformConfig(image_size=96, hflip=0.1))
    assert (config.crop, config.hflip, config.crop_pct) == ("random_resized", 0.1, 0.875)


def test_a_settled_configuration_needs_no_source(digits):
    config = settle(digits, TransformConfig())
    assert settle(None, config) == config
    assert settle(digits, config) == config
    image = digits.splits["test"][0].image
    for train in (True, False):
        assert build_transforms(None, config, train)(image).shape == (1, 32, 32)
    with pytest.raises(ValueError, match="config: image_size is left open"):
        build_transforms(None, TransformConfig(), False)


def test_evaluation_is_the_normalised_picture(digits):
    image = digits.splits["test"][0].image
    (mean,), (std,) = digits.statistics()
    expected = (np.asarray(image, np.float64) / 255 - mean) / std
    result = build_transforms(digits, TransformConfig(), False)(image)
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    assert np.abs(result[0].double().numpy() - expected).max() < 1e-5


def test_evaluation_equals_that_of_timm(photos, picture):
    from timm.data import create_transform

    image = picture(3, size=(90, 70))
    ours = build_transforms(photos, TransformConfig(image_size=(32, 48), crop_pct=0.9, pretrained=True), False)
    theirs = create_transform((32, 48), interpolation="bicubic", crop_pct=0.9)
    assert torch.allclose(ours(image), theirs(image), atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_the_model_decides_on_the_channels(photos, picture, mode, channels):
    for train in (True, False):
        transform = build_transforms(photos, TransformConfig(image_size=24, channels=channels), train)
        result = transform(picture(0, size=(40, 30), mode=mode))
        assert result.shape == (channels, 24, 24)
        if channels == 3 and mode == "L" and not train:
            mean, std = (
                torch.tensor(values)[:, None, None] for values in (transform.config.mean, transform.config.std)
            )
            red, _, blue = result * std + mean
            assert torch.allclose(red, blue, atol=1e-5)


def test_pretrained_weights_keep_the_statistics_of_imagenet(digits, photos):
    assert settle(photos, TransformConfig(pretrained=True)).mean == (0.485, 0.456, 0.406)
    assert settle(digits, TransformConfig(pretrained=True)).mean == pytest.approx((0.449,))
    assert settle(photos, TransformConfig(pretrained=True, mean=(0.1, 0.2, 0.3))).mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("crop", ["none", "pad", "random_resized"])
@pytest.mark.parametrize("size", [(5, 200), (200, 5), (1, 1), (33, 31), (32, 32)])
def test_pictures_of_any_shape_come_to_size(photos, picture, size, crop):
    for train in (True, False):
        transform = build_transforms(photos, TransformConfig(image_size=(32, 24), crop=crop), train)
        assert transform(picture(0, size=size)).shape == (3, 32, 24)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "augmix-m5-w4-d2"},
        {"auto_augment": "3a"},
        {"auto_augment": "original"},
        {"color_jitter": 0.4, "vflip": 0.5},
        {"affine": (30.0, 0.2, 0.3)},
        {"erase": 1.0},
        {"interpolation": "random", "crop": "random_resized"},
    ],
)
def test_every_augmentation_runs_and_is_a_function_of_the_seed(photos, picture, options, channels):
    transform = build_transforms(photos, TransformConfig(image_size=32, channels=channels, **options), True)
    image = picture(0, size=(48, 40))

    def draw(seed):
        seed_everything(seed)
        return transform(image)

    results = [draw(seed) for seed in range(12)]
    assert all(result.shape == (channels, 32, 32) and result.isfinite().all() for result in results)
    assert all(torch.equal(draw(seed), results[seed]) for seed in (0, 5))
    assert len({result.numpy().tobytes() for result in results}) > 6


def test_digits_are_never_mirrored_but_shifted_and_turned(digits):
    transform = build_transforms(digits, TransformConfig(), True)
    image = digits.splits["train"][0].image
    straight = np.asarray(image, float)
    for seed in range(20):
        seed_everything(seed)
        result = transform(image)[0].numpy()
        likeness = [
            np.corrcoef(result.ravel(), other.ravel())[0, 1] for other in (straight, straight[:, ::-1], straight[::-1])
        ]
        assert likeness[0] > 0.5
    names = str(transform._picture)
    assert "Flip" not in names
    assert "RandomAffine" in names


def test_erasing_blanks_to_the_mean(photos, picture):
    transform = build_transforms(photos, TransformConfig(image_size=32, crop="none", hflip=0.0, erase=1.0), True)
    seed_everything(1)
    assert (transform(picture(0, size=(32, 32))) == 0).all(0).sum() > 10


def test_the_shift_is_that_of_padding_by_reflection():
    pixels = np.arange(30, dtype=np.uint8).reshape(5, 6)
    padded = np.pad(pixels, 2, mode="reflect")
    windows = {padded[r : r + 5, c : c + 6].tobytes() for r in range(5) for c in range(5)}
    random.seed(0)
    shift = _ShiftReflected(2, 2)
    assert {np.asarray(shift(Image.fromarray(pixels))).tobytes() for _ in range(500)} == windows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size: got 0"),
        ({"channels": 4}, r"channels: got 4, takes 1 \(grey\) or 3 \(RGB\)"),
        ({"crop": "centre"}, "crop: got 'centre', takes none, pad, random_resized"),
        ({"interpolation": "cubic"}, "interpolation: got 'cubic'"),
        ({"hflip": 1.5}, "hflip: got 1.5, takes a probability"),
        ({"erase": -0.1}, "erase: got -0.1"),
        ({"scale": (0.5, 0.2)}, "scale: got"),
        ({"crop_pct": 1.2}, "crop_pct: got 1.2"),
        ({"color_jitter": -1.0}, "color_jitter: got -1.0"),
        ({"affine": (10.0, 1.5, 0.0)}, "affine: got"),
        ({"mean": (0.5,)}, "mean: got 1 values, takes one for each of the 3 channels"),
        ({"std": (0.5, 0.5, 0.0)}, "std: got"),
        ({"fill": 256}, "fill: got 256"),
        ({"auto_augment": "nonsense"}, "auto_augment: got 'nonsense', takes timm's notation"),
        ({"auto_augment": "rand-x9"}, "auto_augment: got 'rand-x9'"),
    ],
)
def test_values_out_of_range_are_named(photos, options, message):
    with pytest.raises(ValueError, match=message):
        build_transforms(photos, TransformConfig(**options), True)


def test_only_its_own_configuration_is_taken(photos):
    with pytest.raises(TypeError, match="config: got dict, takes a TransformConfig"):
        build_transforms(photos, {"image_size": 32}, True)
