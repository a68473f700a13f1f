"""Decoding: every kind of picture comes out as the same 8-bit grey or colour, and a damaged one as BadSample."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from coterie.data.images import BadSample, decode_image, read_header, read_image, to_mode


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes, channels: int = 3) -> np.ndarray:
    return np.asarray(decode_image(data, channels, "x"))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_eight_bit_grey_or_colour(picture, mode, channels):
    image = picture(mode="L").convert(mode) if mode == "I;16" else picture(mode=mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    decoded = decode_image(save(image, kind), channels, "x")
    assert decoded.mode == ("L" if channels == 1 else "RGB")
    assert decoded.size == image.size


def test_sixteen_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert pixels(save(Image.fromarray(levels), kind), 1).tolist() == [[0, 0, 1, 128, 255]]


def test_floating_point_and_wide_integers_have_no_agreed_range():
    for values in (np.zeros((2, 2), np.float32), np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32)):
        with pytest.raises(BadSample, match="no agreed range"):
            pixels(save(Image.fromarray(values), "TIFF"))


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    for kind in ("PNG", "WEBP"):
        assert pixels(save(image, kind, lossless=True)).tolist() == [[[255] * 3, [10, 20, 30]]]


def test_a_transparent_colour_of_palette_and_grey_is_laid_over_white():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([200, 0, 0, 0, 0, 200])
    assert pixels(save(palette, "PNG", transparency=0)).tolist() == [[[255] * 3, [0, 0, 200]]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert pixels(save(grey, "PNG", transparency=7), 1).tolist() == [[255, 9]]


def test_cmyk_jpeg_is_not_inverted():
    red = save(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(pixels(red).astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert pixels(data, 1).tolist() == upright.tolist()
    assert read_header(data, "x") == (2, 3, True)


def test_unreadable_exif_does_not_cost_the_picture(picture):
    data = save(picture(), "JPEG", exif=b"Exif\x00\x00" + b"\xff" * 40)
    assert pixels(data).shape == (16, 20, 3)


def test_the_first_frame_of_an_animation_is_taken(picture):
    first, second = picture(1, mode="L"), picture(2, mode="L")
    assert (pixels(save(first, "GIF", save_all=True, append_images=[second]), 1) == np.asarray(first)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9])
def test_a_truncated_picture_is_a_bad_sample(encoded, kind, share):
    data = encoded(kind, size=(64, 64))
    with pytest.raises(BadSample) as caught:
        pixels(data[: int(len(data) * share)])
    assert caught.value.name == "x"
    assert "\n" not in caught.value.reason
    assert 0 < len(caught.value.reason) <= 200


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_random_damage_raises_nothing_but_bad_sample(encoded, kind):
    data = np.frombuffer(encoded(kind, size=(32, 32)), np.uint8)
    random = np.random.default_rng(0)
    outcomes = {"bad": 0, "good": 0}
    for _ in range(60):
        damaged = data.copy()
        places = random.integers(0, len(data), 8)
        damaged[places] = random.integers(0, 256, 8)
        try:
            image = decode_image(damaged.tobytes(), 3, "x")
        except BadSample:
            outcomes["bad"] += 1
        else:
            assert image.mode == "RGB"
            outcomes["good"] += 1
    assert sum(outcomes.values()) == 60


@pytest.mark.parametrize("data", [b"hello, world", b"\x00" * 1000, b"\xff\xd8\xff\xe0", b"<svg></svg>"])
def test_what_is_no_picture_says_so(data):
    with pytest.raises(BadSample, match=r"^x: \S"):
        pixels(data)


def test_an_empty_and_a_missing_file(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(BadSample, match=r"empty\.png: the file is empty"):
        read_image(tmp_path / "empty.png", 3)
    with pytest.raises(BadSample, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png", 3)


def test_a_name_that_is_no_unicode_can_be_printed(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with pytest.raises(BadSample) as caught:
        read_image(os.fsdecode(path), 3)
    assert str(caught.value).encode("utf-8").endswith(rb"caf\xe9.png: No such file or directory")


def test_a_decompression_bomb_is_a_bad_sample(monkeypatch, encoded):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadSample, match="bomb"):
        pixels(encoded("PNG", size=(64, 64)))


def test_channels_other_than_one_and_three_are_refused(picture):
    with pytest.raises(ValueError, match="channels: got 4, takes 1"):
        to_mode(picture(), 4)


def test_a_bad_sample_survives_the_way_from_a_worker():
    copy = pickle.loads(pickle.dumps(BadSample("a.png", "cut off")))
    assert (copy.name, copy.reason) == ("a.png", "cut off")
