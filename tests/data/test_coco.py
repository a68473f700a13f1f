"""COCO's json: layouts, categories, crowds, pictures without objects, and everything that can be wrong with it."""

from __future__ import annotations

import json
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from coterie.data import BadSample, Loader, TransformConfig, build_pipeline, open_data

BOX = {"bbox": [2, 3, 10, 8], "category_id": 3, "area": 80, "iscrowd": 0}
MASK = {**BOX, "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]], "area": 79.5}
CROWD = {
    "bbox": [0, 0, 20, 4],
    "category_id": 7,
    "area": 80,
    "iscrowd": 1,
    "segmentation": {"size": [16, 20], "counts": [0, *([4, 12] * 20)]},
}


def opened(root, **options):
    return open_data(f"coco:{root}", target="instances", **options)


def test_a_set_with_masks_and_crowds(coco_folder):
    source = opened(coco_folder(train=[[MASK, CROWD], [MASK]], val=[[MASK], []]))
    assert source.describe() == "coco: 2 classes, 2 train, 2 test images with masks, 20x16 RGB"
    assert (source.classes, source.target, source.has_masks) == (["cat", "dog"], "instances", True)
    sample = source.splits["train"][0]
    assert sample.name.endswith("images/train0.png")
    assert sample.image.size == (20, 16)
    found = sample.label
    assert found.boxes.tolist() == [[2, 3, 12, 11], [0, 0, 20, 4]]
    assert (found.labels.tolist(), found.crowd.tolist(), found.area.tolist()) == ([0, 1], [False, True], [79.5, 80])
    masks = found.decode()
    assert masks[0, 3:11, 2:12].all()
    assert masks[0].sum() == masks[1].sum() == 80
    assert masks[1, :4].all()
    assert len(source.splits["test"].target(1)) == 0


def test_boxes_without_masks(coco_folder):
    source = opened(coco_folder(train=[[BOX], [BOX, BOX]], val=[[BOX]]))
    assert not source.has_masks
    assert source.splits["train"].target(1).masks is None
    with pytest.raises(ValueError, match="coco: its objects have boxes only; masks are needed"):
        build_pipeline(source, TransformConfig(), masks=True)


def test_a_set_with_few_masks_has_boxes_only(coco_folder, caplog):
    source = opened(coco_folder(train=[[BOX, MASK, BOX], [MASK]], val=[[MASK]]))
    assert not source.has_masks
    assert "2 of 4 objects have no mask: opened with boxes only" in caplog.text
    assert source.splits["train"].target(0).masks is None


def test_one_missing_mask_among_many_leaves_out_the_object(coco_folder):
    source = opened(coco_folder(train=[[MASK] * 100, [BOX, MASK]], val=[[MASK]]))
    assert source.has_masks
    assert len(source.splits["train"].target(1)) == 1


def test_training_leaves_out_pictures_without_objects_and_evaluation_keeps_them(coco_folder, caplog):
    with caplog.at_level(logging.INFO):
        source = opened(coco_folder(train=[[BOX], [], [CROWD], [BOX]], val=[[], [BOX]]))
    assert "2 of 4 training images show no object: left out" in caplog.text
    assert [source.splits["train"].name(index)[-10:] for index in range(2)] == ["train0.png", "train3.png"]
    loader = Loader(source.splits["test"], build_pipeline(source, TransformConfig(), train=False), 2)
    (batch,) = loader.batches(0, train=False)
    assert [len(truth["labels"]) for truth in batch["truth"]] == [0, 1]


@pytest.mark.parametrize("layout", ["coco", "coco images", "beside", "roboflow", "one file", "tar", "tar of folders"])
def test_the_layouts_in_use(tmp_path, coco_folder, layout):
    flat = coco_folder(train=[[BOX]] * 12, val=[[BOX]] * 2)
    root = tmp_path / "set"
    root.mkdir()
    places = {
        "coco": ("annotations/instances_{}2017.json", "{}2017/"),
        "coco images": ("annotations/instances_{}2017.json", "images/{}2017/"),
        "beside": ("instances_{}.json", ""),
        "roboflow": ("{}/_annotations.coco.json", "{}/"),
        "one file": ("instances_{}.json", "images/"),
        "tar": ("instances_{}.json", "images/"),
        "tar of folders": ("annotations/instances_{}.json", "{}/"),
    }
    for split in ("train", "val"):
        file, images = (root / part.format(split) for part in places[layout])
        file.parent.mkdir(parents=True, exist_ok=True)
        images.mkdir(parents=True, exist_ok=True)
        file.write_bytes((flat / f"instances_{split}.json").read_bytes())
        for picture in (flat / "images").glob(f"{split}*"):
            (images / picture.name).write_bytes(picture.read_bytes())
    if layout.startswith("tar"):
        with tarfile.open(root / "images.tar", "w") as tar:
            for picture in sorted(root.rglob("*.png")):
                tar.add(picture, picture.relative_to(root))
                picture.unlink()
    if layout == "one file":
        (root / "instances_val.json").unlink()
        source = open_data(root / "instances_train.json", target="instances")
        assert {key: len(split) for key, split in source.splits.items()} == {"train": 11, "test": 1}
    else:
        source = open_data(root, target="instances")
        assert {key: len(split) for key, split in source.splits.items()} == {"train": 12, "test": 2}
    expected = np.asarray(Image.open(flat / "images" / "train3.png"))
    names = [source.splits["train"].name(index) for index in range(len(source.splits["train"]))]
    (place,) = [index for index, name in enumerate(names) if name.endswith("train3.png")]
    assert np.array_equal(np.asarray(source.splits["train"].image(place)), expected)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({**BOX, "bbox": [2, 3, 0, 8]}, "box 2, 3 to 2, 11 has no area"),
        ({**BOX, "bbox": [2, 3, 4, -8]}, "has no area"),
        ({**BOX, "bbox": [20, 3, 4, 8]}, "box 20, 3 to 24, 11 lies outside the picture of 20x16"),
        ({**BOX, "bbox": [-9, 3, 4, 8]}, "lies outside"),
        ({**BOX, "bbox": [2, 3, 4]}, "box [2, 3, 4] is not four numbers"),
        ({**BOX, "bbox": "large"}, "box 'large' is not four numbers"),
        ({**BOX, "bbox": None}, "is not four numbers"),
        ({"category_id": 3}, "is not four numbers"),
        ({**BOX, "bbox": [float("nan"), 3, 4, 8]}, "not of finite numbers"),
        ({**BOX, "category_id": 5}, "unknown category 5"),
        ({**BOX, "category_id": "cat"}, "unknown category 'cat'"),
        ({**BOX, "image_id": 999}, "there is no image of the id 999"),
        ({**BOX, "image_id": [100]}, "there is no image of the id [100]"),
        ({**MASK, "segmentation": {"size": [8, 8], "counts": [64]}}, "its mask is of size [8, 8], the picture of"),
        ({**MASK, "segmentation": [[1, 2, 3]]}, "a polygon of its mask"),
    ],
)
def test_a_bad_annotation_is_skipped_and_reported_with_file_and_id(coco_folder, caplog, annotation, message):
    root = coco_folder(train=[[MASK, MASK, annotation], [MASK]], val=[[MASK]])
    source = opened(root)
    name = f"{root}/instances_train.json: annotation 2"
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"skipped {name}")
    assert message in line
    assert sum(len(source.splits["train"].target(index)) for index in range(2)) == 3
    with pytest.raises(ValueError, match=r"instances_train\.json: 1 of 4 annotations cannot be used, .*annotation 2"):
        opened(root, max_bad_share=0.0)


def test_many_bad_annotations_are_fatal(coco_folder):
    bad = {**BOX, "bbox": [2, 3, 0, 8]}
    root = coco_folder(train=[[BOX] * 48, [bad] * 2], val=[[BOX]])
    with pytest.raises(ValueError, match=r"2 of 50 annotations cannot be used, more than the share of 0\.01"):
        opened(root)
    assert len(opened(root, max_bad_share=0.04).splits["train"].target(0)) == 48


def test_a_box_over_the_edge_is_clipped(coco_folder, caplog):
    over, hardly = {**BOX, "bbox": [-3, 3, 10, 20]}, {**BOX, "bbox": [15, 3, 5.5, 8]}
    source = opened(coco_folder(train=[[over, hardly], [BOX]], val=[[BOX]]), max_bad_share=0.0)
    assert source.splits["train"].target(0).boxes.tolist() == [[0, 3, 7, 16], [15, 3, 20, 11]]
    assert "annotation 0 of train0.png: box reaches 7 pixels over the edge of the picture; clipped" in caplog.text
    assert "annotation 1" not in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("annotations"), "no list 'annotations'"),
        (lambda d: d.update(images={}), "no list 'images'"),
        (lambda d: d["images"].clear(), "no images"),
        (lambda d: d["images"][0].pop("file_name"), "lacks an id or a file_name"),
        (lambda d: d["images"][0].update(id=[1]), "lacks an id or a file_name"),
        (lambda d: d["images"].append(d["images"][0]), "two images of the id 100"),
        (lambda d: d["categories"].append({"id": 3, "name": "cow"}), "two categories of the number 3"),
        (lambda d: d["categories"].append({"id": 4, "name": "dog"}), "or the name 'dog'"),
        (lambda d: d["categories"].append({"name": "cow"}), "lacks an id or a name"),
        (lambda d: [image.update(file_name="no/" + image["file_name"]) for image in d["images"]], "none of its images"),
        (lambda d: d["annotations"].clear(), "no training image has an object"),
    ],
)
def test_a_file_that_is_no_set_is_fatal(coco_folder, change, message):
    root = coco_folder(
        train=[[BOX], [BOX]], val=[[BOX]], change=lambda split, document: split == "train" and change(document)
    )
    with pytest.raises(ValueError, match=message):
        opened(root)


def test_other_mistakes_are_named(tmp_path, coco_folder):
    with pytest.raises(FileNotFoundError, match="coco:nowhere: no such file or folder"):
        opened("nowhere")
    with pytest.raises(ValueError, match=r"no annotation file; takes annotations/instances_<split>\.json"):
        opened(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not a json file"):
        opened(tmp_path / "broken.json")
    root = coco_folder(train=[[BOX]], val=[[BOX]])
    document = json.loads((root / "instances_val.json").read_text())
    document["categories"].append({"id": 1, "name": "cow"})
    (root / "instances_val.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"instances_val\.json: category 'cow' is not among those of the train split"):
        opened(root)
    (root / "instances_valid.json").write_text("{}")
    with pytest.raises(ValueError, match=r"both instances_val\.json and instances_valid\.json hold the validation"):
        opened(root)
    (root / "instances_train.json").unlink()
    (root / "instances_valid.json").unlink()
    with pytest.raises(ValueError, match="no annotations for training, only for validation"):
        opened(root)


def test_sizes_that_the_file_does_not_state_are_read(coco_folder):
    def forget(split, document):
        del document["images"][0]["width"]
        document["images"][-1]["height"] = 10**30

    source = opened(coco_folder(train=[[MASK], [MASK]], val=[[MASK]], change=forget))
    assert [source.splits["train"].target(index).size for index in range(2)] == [(16, 20)] * 2


def test_a_picture_of_another_size_is_a_bad_sample(coco_folder, encoded):
    root = coco_folder(train=[[BOX]] * 3, val=[[BOX]])
    (root / "images" / "train1.png").write_bytes(encoded("PNG", 1, size=(30, 16)))
    source = opened(root)
    with pytest.raises(BadSample, match=r"train1\.png: the picture is 30x16, its annotation says 20x16"):
        source.splits["train"].image(1)
    (root / "images" / "train2.png").unlink()
    loader = Loader(source.splits["train"], build_pipeline(source, TransformConfig()), 1, max_bad_share=0.7)
    assert [batch["index"].item() for batch in loader.batches(0)] == [0, 0, 0]
    assert {name[-10:]: reason for name, reason in loader.bad.items()} == {
        "train1.png": "the picture is 30x16, its annotation says 20x16",
        "train2.png": "No such file or directory",
    }


def test_the_orientation_of_the_annotation_decides(coco_folder):
    root = coco_folder(train=[[BOX]] * 2, val=[[BOX]])
    exif = Image.Exif()
    exif[0x0112] = 6
    lying, standing = Image.new("RGB", (20, 16), "red"), Image.new("RGB", (16, 20), "red")
    lying.save(root / "images" / "train0.png", exif=exif)  # upright 16x20, annotated as it lies: 20x16
    standing.save(root / "images" / "train1.png", exif=exif)  # upright 20x16, annotated so
    source = opened(root)
    assert [source.splits["train"].image(index).size for index in range(2)] == [(20, 16)] * 2


def test_a_damaged_mask_is_a_bad_sample_and_not_a_crash(coco_folder):
    damaged = {**MASK, "segmentation": {"size": [16, 20], "counts": "~~~~"}}
    root = coco_folder(train=[[MASK], [damaged], [MASK]], val=[[MASK], [damaged]])
    source = opened(root)
    for train, split in ((True, "train"), (False, "test")):
        pipeline = build_pipeline(source, TransformConfig(), train=train, masks=True)
        loader = Loader(source.splits[split], pipeline, 3, max_bad_share=0.5)
        (batch,) = loader.batches(0, train=train)
        assert 1 not in batch["index"]
        ((name, reason),) = loader.bad.items()
        assert name.endswith("1.png")
        assert "run lengths of its mask do not add up" in reason
