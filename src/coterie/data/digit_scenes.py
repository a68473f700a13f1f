"""Handwritten digits on photographs, with exact boxes, masks and label maps: real material, composed from a seed.

The digits are those of scikit-learn (see digits.py), enlarged, turned a little and laid in a bright or dark ink of
their own over cut-outs of scikit-learn's two sample photographs; later ones cover earlier ones. Digits and photographs
are divided between the splits: a test scene shows digits and places that no training scene shows. A scene is a function
of (split, its number) and is drawn when it is asked for, so the set costs no file and opens at once.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import Image

from coterie.data.annotations import Instances
from coterie.data.digits import TEST_SHARE
from coterie.data.images import Header
from coterie.data.randomness import hash_key
from coterie.data.source import DataSource, ImageDataset, stratified_split

DEFAULT_SIZE = 128
TRAINING, TEST = 1000, 200
MOST = 6
"""Digits in a scene, at most."""

_TEST_PART = 0.25
"""Share of each photograph's width, on the right, that only test scenes are cut from."""

Scene = tuple[UInt8[np.ndarray, "height width 3"], UInt8[np.ndarray, "height width"], list[int]]


class DigitScenes(ImageDataset):
    """Scenes of one split.

    Args:
        digits: (digits, 8, 8) pictures from 0 to 1.
        digit_labels: the digit of each.
        photographs: the parts of photographs that scenes are cut from.
        key: of the random numbers.
        count: number of scenes.
        size: (height, width) of a scene.
        kind: "instances" or "label_map".
    """

    has_masks = True

    def __init__(
        self,
        digits: Float32[np.ndarray, "digits 8 8"],
        digit_labels: np.ndarray,
        photographs: list[Image.Image],
        key: int,
        count: int,
        size: tuple[int, int],
        kind: str,
    ) -> None:
        self.digits, self.digit_labels, self.photographs = digits, digit_labels, photographs
        self.key, self.size, self.kind = key, size, kind
        self.labels = np.full(count, -1, dtype=np.int64)
        # The picture and its target are asked for one after the other.
        self._scene = functools.lru_cache(maxsize=16)(self._draw)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_scene"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._scene = functools.lru_cache(maxsize=16)(self._draw)

    def read(self, index: int) -> bytes:
        return self._scene(index)[0].tobytes()

    def name(self, index: int) -> str:
        return f"digit-scenes {'train' if self.key == 0 else 'test'} {index}"

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self._scene(index)[0])

    def header(self, index: int) -> Header:
        return Header(*self.size, grey=False)

    def target(self, index: int) -> Any:
        _, owner, labels = self._scene(index)
        if self.kind == "label_map":  # background is class 0, the digit d is class d + 1
            return np.array([0, *(label + 1 for label in labels)], dtype=np.uint8)[owner]
        return _instances(owner, labels)

    def _draw(self, index: int) -> Scene:
        """A scene: its pixels, the number of the digit that each pixel belongs to (from 1; 0 is none), the labels."""
        rng = np.random.default_rng(hash_key(self.key, index))
        height, width = self.size
        scene = self._background(rng)
        owner = np.zeros(self.size, dtype=np.uint8)
        labels: list[int] = []
        for _ in range(int(rng.integers(1, MOST + 1))):
            chosen = int(rng.integers(len(self.digits)))
            side = round(min(height, width) * float(np.exp(rng.uniform(np.log(0.16), np.log(0.45)))))
            ink = _ink(self.digits[chosen], max(side, 8), float(rng.uniform(-20, 20)))
            # Up to a fifth of a digit may lie outside.
            top = int(rng.integers(-(ink.shape[0] // 5), max(height - ink.shape[0] * 4 // 5, 1)))
            left = int(rng.integers(-(ink.shape[1] // 5), max(width - ink.shape[1] * 4 // 5, 1)))
            rows = slice(max(top, 0), min(top + ink.shape[0], height))
            columns = slice(max(left, 0), min(left + ink.shape[1], width))
            ink = ink[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            covered = ink > 0.5
            if covered.sum() < 12 or (covered & (owner[rows, columns] > 0)).sum() > 0.25 * covered.sum():
                continue  # hides too much of what is there already
            behind = scene[rows, columns].mean()
            colour = rng.uniform(170, 255, 3) if behind < 128 else rng.uniform(0, 85, 3)
            scene[rows, columns] += ink[..., None] * (colour - scene[rows, columns])
            labels.append(int(self.digit_labels[chosen]))
            owner[rows, columns][covered] = len(labels)
        scene += 4 * rng.standard_normal(scene.shape, dtype=np.float32)
        return scene.clip(0, 255).astype(np.uint8), owner, labels

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        height, width = self.size
        photograph = self.photographs[int(rng.integers(len(self.photographs)))]
        # The largest cut-out of the scene's shape, or down to a third of it.
        fit = min(photograph.width / width, photograph.height / height) * float(rng.uniform(1 / 3, 1))
        cut_width, cut_height = fit * width, fit * height
        left = float(rng.uniform(0, photograph.width - cut_width))
        top = float(rng.uniform(0, photograph.height - cut_height))
        box = (left, top, left + cut_width, top + cut_height)
        cut = photograph.resize((width, height), Image.Resampling.BILINEAR, box=box)
        if rng.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(cut, dtype=np.float32) * np.float32(rng.uniform(0.6, 1.0))


def _ink(digit: np.ndarray, side: int, degrees: float) -> np.ndarray:
    """A digit drawn at `side` pixels and turned, cut to what is inked: opacity from 0 to 1."""
    image = Image.fromarray(np.pad(np.round(digit * 255).astype(np.uint8), 1))  # strokes reach the edge
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(degrees, Image.Resampling.BILINEAR, expand=True)
    ink = np.clip((np.asarray(image, dtype=np.float32) / 255 - 0.25) / 0.35, 0, 1)
    rows, columns = np.flatnonzero(ink.max(1) > 0), np.flatnonzero(ink.max(0) > 0)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _instances(owner: np.ndarray, labels: list[int]) -> Instances:
    from pycocotools import mask

    kept: list[int] = []
    boxes, masks = [], []
    for number, label in enumerate(labels, 1):
        own: Bool[np.ndarray, "height width"] = owner == number
        if own.sum() < 8:
            continue  # covered by later ones
        rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
        boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        masks.append(own)
        kept.append(label)
    encoded = mask.encode(np.asfortranarray(np.array(masks, dtype=np.uint8).transpose(1, 2, 0))) if masks else []
    return Instances(
        owner.shape,  # type: ignore[arg-type]
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(kept, dtype=np.int64),
        np.zeros(len(kept), dtype=bool),
        np.array([own.sum() for own in masks], dtype=np.float32),
        encoded,
    )


def open_digit_scenes(target: str, image_size: tuple[int, int] | None = None) -> DataSource:
    """1,000 training and 200 test scenes of `image_size` (height, width), 128x128 unless told.

    Classes are "0" to "9"; with label maps "background" comes first.
    """
    from sklearn.datasets import load_digits, load_sample_image

    bunch = load_digits()
    digits = (bunch.images / 16).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    size = image_size or (DEFAULT_SIZE, DEFAULT_SIZE)
    splits: dict[str, ImageDataset] = {}
    for key, rows in enumerate(stratified_split(labels, TEST_SHARE)):
        parts = [_part(photograph, test=key == 1) for photograph in photographs]
        count = TEST if key else TRAINING
        splits["test" if key else "train"] = DigitScenes(digits[rows], labels[rows], parts, key, count, size, target)
    names = [str(digit) for digit in range(10)]
    return DataSource(
        name="digit-scenes",
        classes=["background", *names] if target == "label_map" else names,
        channels=3,
        native_size=size,
        splits=splits,
        mirror=False,
        target=target,
        has_masks=target == "instances",
    )


def _part(photograph: Image.Image, test: bool) -> Image.Image:
    border = round((1 - _TEST_PART) * photograph.width)
    left, right = (border, photograph.width) if test else (0, border)
    return photograph.crop((left, 0, right, photograph.height))
