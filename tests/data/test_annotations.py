"""Masks in COCO's three ways to write them, and annotations that are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as codec

from coterie.data.annotations import BadAnnotation, Instances, _pixels, check_segmentation, encode_mask, no_instances

SIZE = 20, 30
"""Height and width."""


def instances(segmentations, size=SIZE):
    count = len(segmentations)
    return Instances(
        size,
        np.tile(np.array([0, 0, 5, 5], dtype=np.float32), (count, 1)),
        np.arange(count),
        np.arange(count) % 2 == 1,
        np.full(count, 25, dtype=np.float32),
        segmentations,
    )


def runs_of(pixels):
    """Run lengths of a mask, column by column, the first of zeros: the uncompressed form."""
    flat = np.concatenate([[0], pixels.flatten("F"), [2]])
    ends = np.flatnonzero(np.diff(flat) != 0)
    ends = np.concatenate([ends, [len(flat) - 2]]) if ends[-1] != len(flat) - 2 else ends
    return np.diff(np.concatenate([[0], ends])).tolist()


def test_the_three_forms_of_a_mask_give_the_same_pixels():
    pixels = np.zeros(SIZE, dtype=np.uint8)
    pixels[4:12, 7:19] = 1
    compressed = codec.encode(np.asfortranarray(pixels))
    forms = [
        [[7, 4, 19, 4, 19, 12, 7, 12]],
        [[7, 4, 13, 4, 13, 12, 7, 12], [13, 4, 19, 4, 19, 12, 13, 12]],
        {"size": list(SIZE), "counts": runs_of(pixels)},
        compressed,
        {"size": list(SIZE), "counts": compressed["counts"].decode()},
    ]
    decoded = instances(forms).decode()
    assert decoded.shape == (5, *SIZE)
    assert decoded.dtype == np.uint8
    assert all(np.array_equal(one, pixels) for one in decoded)


def test_some_objects_of_a_picture():
    forms = [[[0, 0, 9, 0, 9, 9]], [[0, 0, 5, 0, 5, 5]], [[1, 1, 9, 1, 9, 9]]]
    chosen = instances(forms)[np.array([True, False, True])]
    assert (len(chosen), chosen.labels.tolist(), chosen.segmentations) == (2, [0, 2], [forms[0], forms[2]])
    assert instances(forms).crowd.tolist() == [False, True, False]


def test_a_picture_without_objects_has_masks_of_its_size():
    assert no_instances(SIZE, masks=True).decode().shape == (0, *SIZE)
    assert no_instances(SIZE, masks=False).masks is None
    with pytest.raises(BadAnnotation, match="boxes only"):
        no_instances(SIZE, masks=False).decode()


@pytest.mark.parametrize("seed", range(20))
def test_compressed_run_lengths_are_counted_as_the_codec_counts_them(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 300, 2))
    pixels = (rng.random(size) < rng.random() ** 3).astype(np.uint8)
    if seed % 2:  # long runs, so several characters a number
        pixels = np.repeat(np.repeat(pixels, 7, 0), 40, 1)
    assert _pixels(codec.encode(np.asfortranarray(pixels))["counts"]) == pixels.size


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "its mask is empty"),
        ("text", "neither polygons nor run lengths"),
        ([[0, 0, 5, 5]], "no list of at least three pairs"),
        ([[0, 0, 5, 5, 9]], "no list of at least three pairs"),
        ([[0, 0, 5, 5, 9, 3, 4]], "no list of at least three pairs"),
        ([[0, 0, 5, 5, 9, "x"]], "no numbers"),
        ([[0, 0, 5, 5, 9, [3]]], "no numbers"),
        ([[0, 0, 5, 5, 9, float("nan")]], "far outside"),
        ([[0, 0, 5, 5, 9, 1e9]], "far outside"),
        ({"size": [30, 20], "counts": [600]}, r"of size \[30, 20\], the picture of \[20, 30\]"),
        ({"counts": [600]}, "of size None"),
        ({"size": [20, 30], "counts": [500]}, "do not add up"),
        ({"size": [20, 30], "counts": [700, -100]}, "do not add up"),
        ({"size": [20, 30], "counts": [600.0]}, "do not add up"),
        ({"size": [20, 30], "counts": None}, "are NoneType"),
        ({"size": [20, 30], "counts": ""}, "are str"),
    ],
)
def test_a_wrong_mask_is_named(segmentation, message):
    with pytest.raises(BadAnnotation, match=message):
        check_segmentation(segmentation, SIZE)


@pytest.mark.parametrize("counts", [b"0", b"99", b"\xff\xff~~~", "zzzz", "ü", b"99999999", b"P" * 30])
def test_damaged_run_lengths_are_not_decoded(counts):
    with pytest.raises(BadAnnotation, match="do not add up"):
        encode_mask({"size": list(SIZE), "counts": counts}, SIZE)
