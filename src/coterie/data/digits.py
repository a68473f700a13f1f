"""Handwritten digits: the 1,797 real pictures of 8x8 pixels that scikit-learn ships, drawn larger.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
(the test part of it; 17 levels of grey). Nothing is fetched: the figures are part of scikit-learn. They have no
official split; here a fifth of each class, always the same one, is the test split.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from coterie.data.images import Header, to_mode
from coterie.data.source import DataSource, ImageDataset, assemble, stratified_split

TEST_SHARE = 0.2
DEFAULT_SIZE = 32


class Digits(ImageDataset):
    """Digits of 8x8 pixels, enlarged to `size` with bicubic interpolation when they are asked for."""

    def __init__(
        self,
        pixels: UInt8[np.ndarray, "samples 8 8"],
        labels: Int64[np.ndarray, " samples"],
        rows: Int64[np.ndarray, " samples"],
        size: tuple[int, int],
    ) -> None:
        self.pixels, self.labels, self.rows, self.size = pixels, labels, rows, size

    def read(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def name(self, index: int) -> str:
        return f"digits row {self.rows[index]}"

    def image(self, index: int) -> Image.Image:
        height, width = self.size
        image = Image.fromarray(self.pixels[index]).resize((width, height), Image.Resampling.BICUBIC)
        return to_mode(image, self.channels)

    def header(self, index: int) -> Header:
        return Header(*self.size, grey=True)


def open_digits(image_size: tuple[int, int] | None = None) -> DataSource:
    """The digits, white on black, drawn at `image_size` (height, width), 32x32 unless told."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    size = image_size or (DEFAULT_SIZE, DEFAULT_SIZE)
    train, test = (Digits(pixels[rows], labels[rows], rows, size) for rows in stratified_split(labels, TEST_SHARE))
    classes = [str(name) for name in bunch.target_names]
    return assemble("digits", classes, {"train": train, "test": test}, mirror=False, background=0)
