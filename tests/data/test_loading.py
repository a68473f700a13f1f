"""Batches: what they are a function of, and what becomes of pictures that cannot be read."""

from __future__ import annotations

import io
import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image

from coterie.data import (
    BadSample,
    ImageDataset,
    Loader,
    TooManyBadSamples,
    TransformConfig,
    build_transforms,
    open_data,
)
from coterie.data import cache as cache_module
from coterie.data.cache import decode_all


class Flat(ImageDataset):
    """Pictures of 4x4 pixels whose value is their index; those in `broken` are cut off."""

    channels = 1

    def __init__(self, length=20, broken=()):
        self.labels = np.arange(length) % 3
        self.broken = set(broken)
        self.decoded = 0

    def name(self, index):
        return f"flat/{index}.png"

    def read(self, index):
        self.decoded += 1
        buffer = io.BytesIO()
        Image.new("L", (4, 4), index).save(buffer, "PNG")
        return buffer.getvalue()[: 45 if index in self.broken else None]


def plain(image):
    return torch.from_numpy(np.array(image, dtype=np.float32))[None]


def noisy(image):
    """Draws from all three global generators, as augmentation does."""
    return plain(image) + torch.rand(1) + random.random() + float(np.random.rand())  # noqa: NPY002


def collect(loader, epoch=0, start=0, train=True):
    return list(loader.batches(epoch, start, train))


def same(first, second):
    return len(first) == len(second) and all(
        one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        for one, other in zip(first, second, strict=True)
    )


def pixel_by_index(batches):
    rows = [
        row
        for batch in batches
        for row in zip(batch["index"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True)
    ]
    return dict(rows)


def test_a_training_batch():
    batches = collect(Loader(Flat(), plain, 6))
    assert len(batches) == Loader(Flat(), plain, 6).num_batches() == 3
    for batch in batches:
        assert (batch["image"].shape, batch["image"].dtype) == ((6, 1, 4, 4), torch.float32)
        assert (batch["label"].dtype, batch["index"].dtype) == (torch.int64, torch.int64)
        assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["index"])
        assert torch.equal(batch["label"], batch["index"] % 3)
    assert len(torch.cat([batch["index"] for batch in batches]).unique()) == 18


def test_evaluation_shows_every_picture_once_in_order():
    loader = Loader(Flat(), plain, 6)
    batches = collect(loader, train=False)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(20))
    assert [len(batch["index"]) for batch in batches] == [6, 6, 6, 2]
    assert loader.num_batches(train=False) == 4


def test_order_and_augmentation_are_functions_of_seed_and_epoch():
    first = collect(Loader(Flat(), noisy, 5, seed=1), 3)
    assert same(first, collect(Loader(Flat(), noisy, 5, seed=1), 3))
    for seed, epoch in ((2, 3), (1, 4)):
        other = collect(Loader(Flat(), noisy, 5, seed=seed), epoch)
        assert [b["index"].tolist() for b in other] != [b["index"].tolist() for b in first]
        values, others = (pixel_by_index(batches) for batches in (first, other))
        assert all(values[index] != others[index] for index in range(20))


def test_order_and_augmentation_do_not_depend_on_the_batch_size():
    large, small = (pixel_by_index(collect(Loader(Flat(), noisy, size), 2)) for size in (10, 4))
    assert large == small
    assert len(large) == 20


@pytest.mark.parametrize("cache", [True, False])
def test_workers_change_nothing(cache):
    for train in (True, False):
        expected = collect(Loader(Flat(21, broken={3}), noisy, 4, cache=cache, max_bad_share=0.1), 2, 0, train)
        loader = Loader(Flat(21, broken={3}), noisy, 4, cache=cache, max_bad_share=0.1, workers=2)
        assert same(collect(loader, 2, 0, train), expected)
        assert same(collect(loader, 2, 2, train), expected[2:])
        assert list(loader.bad) == ["flat/3.png"]
        loader.close()


def test_real_augmentation_with_workers():
    source = open_data("digits")
    transform = build_transforms(source, TransformConfig(), True)
    expected = collect(Loader(source.splits["train"], transform, 256), 1, 3)
    loader = Loader(source.splits["train"], transform, 256, workers=2)
    assert same(collect(loader, 1, 3), expected)
    loader.close()


def test_ranks_take_slices_of_the_global_batch():
    whole = collect(Loader(Flat(50), noisy, 12), 1)
    parts = [collect(Loader(Flat(50), noisy, 12, rank=rank, world_size=3), 1) for rank in range(3)]
    joined = [{key: torch.cat([part[key] for part in batch]) for key in batch[0]} for batch in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_ranks_get_equal_shares_of_an_evaluation():
    parts = [collect(Loader(Flat(22), plain, 8, rank=rank, world_size=4), train=False) for rank in range(4)]
    shapes = [[tuple(batch["image"].shape) for batch in part] for part in parts]
    assert shapes == [[(2, 1, 4, 4)] * 3] * 4
    rows = [i for batch in zip(*parts, strict=True) for part in batch for i in part["index"].tolist()]
    assert rows == [*range(22), -1, -1]
    assert parts[3][2]["label"].tolist() == [-1, -1]
    assert (parts[3][2]["image"] == 0).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_start_anywhere(workers):
    loader = Loader(Flat(50), noisy, 8, workers=workers)
    for train in (True, False):
        whole = collect(loader, 5, 0, train)
        for start in range(len(whole) + 1):
            assert same(collect(loader, 5, start, train), whole[start:])
    loader.close()


def test_an_epoch_left_early_does_not_leak_into_the_next():
    loader = Loader(Flat(50), noisy, 5, workers=2)
    interrupted = loader.batches(0)
    next(interrupted)
    assert same(collect(loader, 1), collect(Loader(Flat(50), noisy, 5), 1))
    with pytest.raises(RuntimeError, match="a new iteration over the same Loader began"):
        next(interrupted)
    loader.close()
    assert same(collect(loader, 2), collect(Loader(Flat(50), noisy, 5), 2))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_left_alone(workers):
    def draw():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(7), random.seed(7), np.random.seed(7)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    loader = Loader(Flat(), noisy, 4, workers=workers)
    iterator = loader.batches(0)
    next(iterator)
    assert draw() == expected
    seed()
    list(iterator)
    list(loader.batches(1))
    assert draw() == expected
    loader.close()


def test_a_set_smaller_than_a_batch_is_repeated():
    (batch,) = collect(Loader(Flat(3), noisy, 8))
    assert sorted(np.bincount(batch["index"])) == [2, 3, 3]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_replaced_by_the_next_good_one(cache, workers, caplog):
    loader = Loader(Flat(40, broken={7, 8}), plain, 8, cache=cache, max_bad_share=0.1, workers=workers)
    good = Loader(Flat(40), plain, 8)
    for epoch in range(3):
        expected = [[9 if i in (7, 8) else i for i in batch["index"].tolist()] for batch in good.batches(epoch)]
        assert [batch["index"].tolist() for batch in loader.batches(epoch)] == expected
    loader.close()
    assert set(loader.bad) == {"flat/7.png", "flat/8.png"}
    assert all("truncated" in reason for reason in loader.bad.values())
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sorted(warnings) == sorted(f"skipped {name}: {reason}" for name, reason in loader.bad.items())


def test_the_last_bad_sample_is_replaced_by_the_first_good_one():
    loader = Loader(Flat(10, broken={9, 0}), plain, 10, max_bad_share=0.2)
    (batch,) = collect(loader)
    assert sorted(batch["index"].tolist()) == [1, 1, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_samples_out(workers):
    loader = Loader(Flat(10, broken={0, 1, 6}), plain, 2, max_bad_share=0.3, workers=workers)
    assert [batch["index"].tolist() for batch in loader.batches(0, train=False)] == [[2, 3], [4, 5], [7], [8, 9]]
    loader.close()


def test_evaluation_over_ranks_keeps_the_place_of_bad_samples():
    loaders = [Loader(Flat(8, {0, 1}), plain, 4, rank=rank, world_size=2, max_bad_share=0.5) for rank in range(2)]
    rows = [[batch["index"].tolist() for batch in loader.batches(0, train=False)] for loader in loaders]
    assert rows == [[[-1, -1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [True, False])
def test_too_many_bad_samples_stop_the_run(cache, workers, train):
    loader = Loader(Flat(40, broken=range(0, 40, 2)), plain, 8, cache=cache, workers=workers, max_bad_share=0.1)
    with pytest.raises(
        TooManyBadSamples, match=r"of 40 images cannot be read, more than the share of 0\.1 .*flat/\d+\.png"
    ):
        collect(loader, 0, 0, train)
    loader.close()


def test_one_bad_sample_is_put_up_with_unless_none_are():
    assert len(collect(Loader(Flat(20, broken={4}), plain, 5))) == 4
    for cache in (True, False):
        with pytest.raises(TooManyBadSamples, match=r"1 of 20 images.*flat/4\.png"):
            collect(Loader(Flat(20, broken={4}), plain, 5, max_bad_share=0.0, cache=cache))
        with pytest.raises(TooManyBadSamples, match=r"20 of 20 images"):
            collect(Loader(Flat(20, broken=range(20)), plain, 5, max_bad_share=1.0, cache=cache), train=True)


def test_bad_samples_are_not_decoded_again():
    dataset = Flat(10, broken={4})
    loader = Loader(dataset, plain, 5, cache=False)
    collect(loader)
    decoded = dataset.decoded
    collect(loader, 1)
    assert dataset.decoded == decoded + 10  # nine good ones, and the neighbour a second time


def test_a_rank_that_meets_few_pictures_takes_the_share_of_those():
    dataset = Flat(200, broken=range(0, 200, 20))  # a twentieth
    for rank in range(2):
        assert collect(Loader(dataset, plain, 20, rank=rank, world_size=2, cache=False, max_bad_share=0.1), 0)
        with pytest.raises(TooManyBadSamples, match="of 100 images"):
            collect(Loader(dataset, plain, 20, rank=rank, world_size=2, cache=False, max_bad_share=0.01), 0)


def test_many_bad_samples_are_counted_without_a_line_each(caplog):
    loader = Loader(Flat(100, broken=range(0, 100, 2)), plain, 10, max_bad_share=0.5)
    collect(loader)
    assert len(loader.bad) == 50
    assert len(caplog.records) == 21


def test_the_cache_decodes_once_and_only_what_fits(monkeypatch):
    for options, decoded in (({"cache": True}, 20), ({"cache": "auto"}, 20 + 20), ({"cache": False}, 60)):
        dataset = Flat()
        loader = Loader(dataset, plain, 5, **options)
        batches = [collect(loader, epoch) for epoch in range(3)]
        assert dataset.decoded == decoded, options  # "auto" reads every header of so small a set first
        assert same(batches[2], collect(Loader(Flat(), plain, 5, cache=False), 2))
    monkeypatch.setattr("coterie.data.loading.LIMIT", 100)
    dataset = Flat()
    loader = Loader(dataset, plain, 5)
    collect(loader), collect(loader)
    assert dataset.decoded == 20 + 40
    assert decode_all(Flat(), 0, limit=16 * 19) is None
    assert cache_module.LIMIT == 2**30


def test_the_cache_keeps_the_whole_dataset():
    cached = decode_all(Flat(10, broken={2}), 3)
    assert cached.header(3) == (4, 4, True)
    assert (cached[5].name, cached[5].label, np.asarray(cached[5].image).max()) == ("flat/5.png", 2, 5)
    assert cached.read(5) == Flat().read(5)
    with pytest.raises(BadSample, match=r"flat/2\.png"):
        cached[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 5, "world_size": 2}, "batch_size: got 5, takes a positive multiple of the 2 ranks"),
        ({"rank": 2, "world_size": 2}, "rank: got 2 of world_size 2"),
        ({"rank": -1}, "rank: got -1"),
        ({"workers": -1}, "workers: got -1"),
        ({"cache": "yes"}, "cache: got 'yes'"),
        ({"max_bad_share": 1.5}, "max_bad_share: got 1.5"),
        ({"dataset": Flat(0)}, "dataset: got no images"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Loader(**{"dataset": Flat(), "transform": plain, "batch_size": 4} | options)


def test_a_start_beyond_the_epoch_is_named_at_once():
    with pytest.raises(ValueError, match="start_batch: got 6, takes 0 to 5"):
        Loader(Flat(), plain, 4).batches(0, 6)
