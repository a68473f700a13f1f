"""Rows and batches of dense sets: pictures, label maps, boxes and masks stay together, and only the seed decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

from coterie.data import DataSource, ImageDataset, Loader, TransformConfig, build_pipeline
from coterie.data.annotations import IGNORE, BadAnnotation, Instances, no_instances
from coterie.data.joint import Photometric, evaluation_size
from coterie.data.transforms import settle

PLAIN = TransformConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), color_jitter=0.0)
"""Pixels come out as they are, from 0 to 1."""


class Blocks(ImageDataset):
    """Pictures of black ground with rectangles; the red channel of each tells its class, and nothing else is red."""

    has_masks = True

    def __init__(self, kind, sizes=((64, 96),) * 6, objects=5, crowd=False):
        self.kind, self.sizes, self.objects, self.crowd = kind, sizes, objects, crowd
        self.labels = np.full(len(sizes), -1)

    def name(self, index):
        return f"blocks/{index}"

    def read(self, index):
        raise NotImplementedError

    def header(self, index):
        from coterie.data.images import Header

        return Header(*self.sizes[index], grey=False)

    def map(self, index):
        rng = np.random.default_rng(index)
        height, width = self.sizes[index]
        labels = np.zeros((height, width), dtype=np.uint8)
        for number in range(self.objects):  # side by side, so that none hides another
            left = number * width // self.objects
            top = int(rng.integers(0, height // 2))
            labels[top : top + height // 3, left : left + width // self.objects - 2] = number + 1
        return labels

    def image(self, index):
        labels = self.map(index)
        return Image.fromarray(np.stack([labels * 40, np.full_like(labels, 200), labels * 0], 2))

    def target(self, index):
        labels = self.map(index)
        if self.kind == "label_map":
            return labels
        from pycocotools import mask

        if not self.objects:
            return no_instances(labels.shape, masks=True)
        masks = torch.stack([torch.from_numpy(labels == number) for number in range(1, self.objects + 1)])
        boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
        return Instances(
            labels.shape,
            boxes.numpy(),
            np.arange(self.objects),
            np.arange(self.objects) == (1 if self.crowd else -1),
            np.ones(self.objects, dtype=np.float32),
            mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))),
        )


def source(kind, **options):
    dataset = Blocks(kind, **options)
    classes = ["ground"] * (kind == "label_map") + [f"block {number}" for number in range(5)]
    return DataSource("blocks", classes, 3, (64, 96), {"train": dataset, "test": dataset}, target=kind, has_masks=True)


def batches(kind, config=PLAIN, train=True, size=6, masks=True, epochs=1, **options):
    blocks = source(kind, **options)
    pipeline = build_pipeline(blocks, config, train=train, masks=masks and kind == "instances")
    loader = Loader(blocks.splits["train"], pipeline, size)
    return [batch for epoch in range(epochs) for batch in loader.batches(epoch, train=train)]


def inside(labels):
    """Pixels whose eight neighbours have the same label: those that no interpolation has mixed."""
    padded = torch.nn.functional.pad(labels[None].float(), (2, 2, 2, 2), mode="replicate")[0].long()
    height, width = labels.shape
    same = torch.ones_like(labels, dtype=torch.bool)
    for down in range(5):
        for right in range(5):
            same &= padded[down : down + height, right : right + width] == labels
    return same


def test_pictures_and_label_maps_move_together():
    seen = 0
    for batch in batches("label_map", replace(PLAIN, vflip=0.5), epochs=8):
        assert batch["label_map"].shape == batch["image"][:, 0].shape
        for number in range(6):
            height, width = batch["size"][number].tolist()
            labels = batch["label_map"][number]
            assert (labels[height:] == IGNORE).all()
            assert (labels[:, width:] == IGNORE).all()
            labels, picture = labels[:height, :width], batch["image"][number, :, :height, :width] * 255
            assert labels.max() <= 5
            certain = inside(labels)
            seen += int(certain.sum())
            assert (picture[0] - labels * 40)[certain].abs().max() <= 1
    assert seen > 100_000


def test_pictures_boxes_and_masks_move_together():
    config = replace(PLAIN, scale_jitter=(0.6, 2.0), vflip=0.5)
    count = cut = 0
    for batch in batches("instances", config, epochs=8):
        height, width = batch["image"].shape[-2:]
        for number, found in enumerate(batch["instances"]):
            boxes, masks = found["boxes"], found["masks"]
            assert masks.shape == (len(boxes), height, width)
            assert masks.dtype == torch.uint8
            assert boxes.dtype == torch.float32
            real_height, real_width = batch["size"][number].tolist()
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, 2] <= real_width).all()
            assert (boxes[:, 3] <= real_height).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            tight = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
            assert (tight - boxes).abs().max() <= 2
            for label, mask in zip(found["labels"].tolist(), masks, strict=True):
                certain = inside(mask.long()) & (mask == 1)
                if certain.any():
                    assert (batch["image"][number, 0][certain] * 255 - 40 * (label + 1)).abs().max() <= 1
            count += len(boxes)
            cut += 5 - len(boxes)
    assert count > 100
    assert cut > 5


def test_masks_are_made_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(Instances, "decode", lambda self: pytest.fail("decoded"))
    (batch,) = batches("instances", masks=False)
    assert set(batch["instances"][0]) == {"boxes", "labels", "crowd"}
    (batch,) = batches("instances", masks=False, train=False)
    assert set(batch["truth"][0]) == {"boxes", "labels", "crowd", "area"}


def test_boxes_are_the_same_with_and_without_masks_as_long_as_nothing_is_cut():
    config = replace(PLAIN, scale_jitter=(0.7, 1.0))
    (with_masks,), (without,) = batches("instances", config), batches("instances", config, masks=False)
    for one, other in zip(with_masks["instances"], without["instances"], strict=True):
        assert torch.equal(one["boxes"], other["boxes"])


def test_training_leaves_out_crowds_and_evaluation_keeps_them():
    (batch,) = batches("instances", replace(PLAIN, scale_jitter=(1.0, 1.0)), crowd=True)
    assert [sorted(found["labels"].tolist()) for found in batch["instances"]] == [[0, 2, 3, 4]] * 6
    (batch,) = batches("instances", train=False, crowd=True)
    assert batch["truth"][0]["crowd"].tolist() == [False, True, False, False, False]


def test_a_picture_may_have_no_object_left():
    (batch,) = batches("instances", objects=0)
    for found in batch["instances"]:
        assert found["boxes"].shape == (0, 4)
        assert found["masks"].shape == (0, *batch["image"].shape[-2:])
        assert len(found["labels"]) == len(found["crowd"]) == 0
    config = replace(PLAIN, image_size=(8, 8), scale_jitter=(4.0, 4.0))
    counts = [len(found["boxes"]) for batch in batches("instances", config, epochs=4) for found in batch["instances"]]
    assert min(counts) == 0


def test_evaluation_keeps_the_truth_at_the_original_resolution():
    sizes = ((64, 96), (96, 64), (100, 40), (128, 192))
    config = replace(PLAIN, min_size=32, max_size=60)
    (batch,) = batches("label_map", config, train=False, size=4, sizes=sizes)
    assert batch["original_size"].tolist() == [list(size) for size in sizes]
    assert batch["size"].tolist() == [[32, 48], [48, 32], [60, 24], [32, 48]]
    assert [tuple(truth.shape) for truth in batch["truth"]] == list(sizes)
    assert all(truth.dtype == torch.int64 for truth in batch["truth"])
    assert torch.equal(batch["truth"][3], torch.from_numpy(Blocks("label_map", sizes).map(3)).long())
    assert batch["image"].shape == (4, 3, 60, 48)
    assert "label_map" not in batch
    (batch,) = batches("instances", config, train=False, size=4, sizes=sizes)
    expected = Blocks("instances", sizes).target(2)
    assert torch.equal(batch["truth"][2]["boxes"], torch.from_numpy(expected.boxes))
    assert batch["truth"][2]["masks"] == expected.masks
    assert batch["truth"][2]["masks"][0]["size"] == [100, 40]


def test_padding_is_zero_and_marked():
    config = replace(PLAIN, mean=(0.5, 0.5, 0.5))
    sizes = ((64, 96), (64, 80), (50, 96))
    (batch,) = batches("label_map", config, train=False, size=3, sizes=sizes)
    for image, mask, (height, width) in zip(batch["image"], batch["mask"], batch["size"].tolist(), strict=True):
        assert mask[:height, :width].all()
        assert mask.sum() == height * width
        assert (image[:, ~mask] == 0).all()
        assert (image[1, mask] != 0).all()
    (batch,) = batches("label_map", config, train=False, size=3, sizes=sizes[:1] * 3)
    assert "mask" not in batch


@pytest.mark.parametrize("kind", ["label_map", "instances"])
def test_a_picture_without_a_target_becomes_a_batch(kind):
    pipeline = build_pipeline(source(kind), PLAIN, train=False)
    row = pipeline(Blocks(kind).image(0), None)
    assert set(pipeline.collate([row, row])) == {"image", "size", "original_size"}


@pytest.mark.parametrize("kind", ["label_map", "instances"])
@pytest.mark.parametrize("train", [True, False])
def test_workers_ranks_and_interruptions_change_nothing(kind, train):
    blocks = source(kind, sizes=((64, 96), (48, 64), (40, 40), (64, 64), (60, 96), (64, 70), (50, 50)))
    pipeline = build_pipeline(blocks, TransformConfig(), train=train, masks=kind == "instances")

    def run(start=0, **options):
        loader = Loader(blocks.splits["train"], pipeline, 2, seed=3, **options)
        found = list(loader.batches(1, start, train))
        loader.close()
        return found

    def same(one, other):
        if isinstance(one, torch.Tensor):
            return torch.equal(one, other)
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, list):
            return len(one) == len(other) and all(map(same, one, other))
        return one == other

    expected = run()
    assert same(run(cache=False), expected)
    assert same(run(workers=2), expected)
    assert same(run(1), expected[1:])
    parts = [run(rank=rank, world_size=2) for rank in range(2)]
    for key in ("index", "size"):
        joined = [torch.cat([part[key][part["index"] >= 0] for part in batch]) for batch in zip(*parts, strict=True)]
        assert same(joined, [batch[key] for batch in expected])
    if not train:
        assert parts[1][-1]["index"].tolist() == [-1]
        assert (parts[1][-1]["image"] == 0).all()
        assert len(parts[1][-1]["truth"]) == 1


def test_a_target_of_another_size_is_a_bad_sample():
    class Wrong(Blocks):
        def target(self, index):
            return Blocks(self.kind, ((32, 32),) * 6).target(index) if index == 2 else super().target(index)

    for kind, message in (("label_map", "its label map is 32x32, the picture 96x64"), ("instances", "is for 32x32")):
        blocks = source(kind)
        loader = Loader(Wrong(kind), build_pipeline(blocks, PLAIN), 6, max_bad_share=0.5, cache=False)
        (batch,) = loader.batches(0)
        assert sorted(batch["index"].tolist()) == [0, 1, 3, 3, 4, 5]
        assert message in loader.bad["blocks/2"]
    with pytest.raises(BadAnnotation, match="boxes only; masks are needed"):
        build_pipeline(source("instances"), PLAIN, masks=True)(
            Blocks("instances").image(0), Instances((64, 96), *[np.zeros((0, 4))] * 4)
        )


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (800, 1333), (800, 1067)),
        ((400, 1000), (800, 1333), (533, 1333)),
        ((1024, 2048), (1024, 4096), (1024, 2048)),
        ((5, 1000), (10, 100), (1, 100)),
    ],
)
def test_the_size_of_evaluation(size, limits, expected):
    assert evaluation_size(size, *limits) == expected


def test_what_is_left_open_suits_the_source():
    settled = settle(source("label_map"), TransformConfig())
    assert (settled.image_size, settled.min_size, settled.max_size) == ((64, 96), 64, 256)
    assert (settled.scale_jitter, settled.color_jitter, settled.hflip) == ((0.5, 2.0), 0.5, 0.5)
    assert settle(None, settled) == settled
    settled = settle(source("instances"), TransformConfig(image_size=40))
    assert (settled.image_size, settled.min_size, settled.max_size) == ((64, 64), 40, 67)
    assert settled.scale_jitter == (0.8, 1.25)
    settled = settle(source("instances"), TransformConfig(image_size=(40, 50)))
    assert (settled.image_size, settled.min_size) == ((40, 50), 40)
    city = DataSource("city", ["a"], 3, (1024, 2048), {}, target="label_map")
    settled = settle(city, TransformConfig(mean=(0.5,) * 3, std=(0.5,) * 3))
    assert (settled.image_size, settled.min_size, settled.max_size) == ((512, 1024), 1024, 4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "pad"}, "crop: got 'pad', which is for classification; blocks has label_map"),
        ({"erase": 0.5}, "erase: got 0.5"),
        ({"auto_augment": "rand-m9"}, "auto_augment: got 'rand-m9'"),
        ({"affine": (10, 0, 0)}, "affine: got"),
        ({"min_size": 0}, "min_size: got 0"),
        ({"min_size": 100, "max_size": 50}, "max_size: got 50, takes at least min_size, 100"),
        ({"scale_jitter": (2.0, 1.0)}, r"scale_jitter: got \(2.0, 1.0\)"),
        ({"scale_jitter": (0.0, 1.0)}, r"scale_jitter: got \(0.0, 1.0\)"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        settle(source("label_map"), TransformConfig(**options))


def test_a_pipeline_says_what_it_needs():
    with pytest.raises(ValueError, match="target: got 'boxes', takes class, label_map, instances"):
        build_pipeline(source("label_map"), PLAIN, "boxes")
    classification = settle(
        DataSource("c", ["a", "b"], 3, (8, 8), {}), TransformConfig(mean=(0.5,) * 3, std=(1.0,) * 3)
    )
    with pytest.raises(ValueError, match="min_size is left open"):
        build_pipeline(None, classification, "label_map")


def test_photometric_distortion():
    torch.manual_seed(0)
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    colour = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    distort, seen = Photometric(0.5), []
    for _ in range(200):
        changed = distort(grey)
        assert (changed[0] - changed[1]).abs().max() < 0.5  # grey stays grey, whatever hue and saturation do
        assert changed.min() > 85
        assert changed.max() < 115
        other = distort(colour)
        assert other.min() >= 0
        assert other.max() <= 255
        seen.append(torch.allclose(other, colour.float(), atol=1e-2))
    assert 3 <= sum(seen) <= 30  # one in sixteen
    assert torch.allclose(Photometric(0.0)(colour), colour.float(), atol=1e-2)
    assert Photometric(1.0)(colour[:1]).shape == (1, 8, 8)
