"""Pascal VOC: boxes, splits, label maps, and xml that is wrong or hostile."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from PIL import Image

from coterie.data import IGNORE, open_data
from coterie.data.voc import parse_xml

OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"
SIDES = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"


def thing(name="dog", box=(3, 4, 12, 11), difficult=0):
    return OBJECT.format(name, difficult, SIDES.format(*box))


def annotation(*objects, size="<size><width>20</width><height>16</height><depth>3</depth></size>", file=""):
    return f"<annotation><filename>{file}</filename>{size}{''.join(objects)}</annotation>"


@pytest.fixture
def voc(tmp_path, encoded):
    """Writes a VOC set: voc({"train": [xml, ...], "val": [...]}) gives its folder."""

    def make(splits, root="VOC2012", lists=True):
        folder = tmp_path / root
        for name in ("Annotations", "JPEGImages", "ImageSets/Main", "ImageSets/Segmentation"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for split, texts in splits.items():
            names = [f"{split}_{number}" for number in range(len(texts))]
            for number, (name, text) in enumerate(zip(names, texts, strict=True)):
                (folder / "Annotations" / f"{name}.xml").write_text(text)
                (folder / "JPEGImages" / f"{name}.jpg").write_bytes(encoded("JPEG", number))
            if lists:
                (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
                (folder / "ImageSets" / "Main" / f"dog_{split}.txt").write_text(f"{names[0]} -1\n")
        return folder

    return make


def test_boxes_count_from_one_and_include_their_last_pixel(voc, tmp_path):
    root = voc({"train": [annotation(thing(), thing("cat", (1, 1, 20, 16), 1))] * 2, "val": [annotation()]})
    for spec in (f"voc:{root}", f"voc:{tmp_path}", root):
        source = open_data(spec, target="instances")
        found = source.splits["train"].target(0)
        assert found.boxes.tolist() == [[2, 3, 12, 11], [0, 0, 20, 16]]
        assert [source.classes[label] for label in found.labels] == ["dog", "cat"]
        assert found.crowd.tolist() == [False, True]
        assert found.area.tolist() == [80, 320]
    assert (len(source.classes), source.has_masks) == (20, False)
    assert len(source.splits["test"].target(0)) == 0


def test_layouts_without_lists(voc, tmp_path):
    root = voc({"train": [annotation(thing("ship"), thing("ark"))] * 12}, lists=False)
    source = open_data(root, target="instances")
    assert source.classes == ["ark", "ship"]
    assert {key: len(split) for key, split in source.splits.items()} == {"train": 11, "test": 1}
    flat = tmp_path / "flat"
    for split in ("train", "test"):
        (flat / split).mkdir(parents=True)
        Image.new("RGB", (20, 16)).save(flat / split / "1.png")
        (flat / split / "1.xml").write_text(annotation(thing("ship"), file=r"C:\pictures\1.png"))
    source = open_data(flat, target="instances")
    assert source.splits["test"].name(0).endswith("flat/test/1.png")
    assert source.splits["test"].image(0).size == (20, 16)


def test_sizes_that_the_file_does_not_state_are_read(voc):
    for size in ("", "<size><width>0</width><height>0</height></size>", "<size><width>x</width></size>"):
        root = voc({"train": [annotation(thing(), size=size)] * 2, "val": [annotation(thing())]})
        assert open_data(root, target="instances").splits["train"].target(0).size == (16, 20)
    (root / "JPEGImages" / "train_1.jpg").unlink()
    with pytest.raises(ValueError, match=r"train_1\.xml: states no size, and its picture cannot be read"):
        open_data(root, target="instances")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (thing(box=(5, 5, 4, 9)), "box 4, 4 to 4, 9 has no area"),
        (thing(box=(50, 5, 60, 9)), "lies outside the picture of 20x16"),
        (thing(box=("a", 5, 60, 9)), "is not four numbers"),
        (thing("unicorn"), "unknown category 'unicorn'"),
        ("<object><name>dog</name></object>", "box None is not four numbers"),
    ],
)
def test_a_bad_object_is_skipped_and_reported(voc, caplog, entry, message):
    root = voc({"train": [annotation(thing())] * 2, "val": [annotation(thing(), entry)]})
    source = open_data(root, target="instances")
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"skipped {root}/Annotations/val_0.xml: object 2: ")
    assert message in line
    assert len(source.splits["test"].target(0)) == 1
    with pytest.raises(ValueError, match="1 of 2 annotations cannot be used"):
        open_data(root, target="instances", max_bad_share=0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;&b;">]><annotation>&c;</annotation>',
            "with a document type",
        ),
        (
            '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation>&b;</annotation>',
            "with a document type",
        ),
        ("<annotation><object>", "not an xml file"),
        ("", "not an xml file"),
        ("<annotation>&unknown;</annotation>", "not an xml file"),
    ],
)
def test_hostile_and_damaged_xml_is_refused(voc, text, message):
    root = voc({"train": [annotation(thing()), text], "val": [annotation(thing())]})
    with pytest.raises(ValueError, match=rf"train_1\.xml: .*{message}"):
        open_data(root, target="instances")


def test_text_comes_in_one_piece(tmp_path):
    (tmp_path / "a.xml").write_text(f"<a><b>{'x' * 100_000}&amp;y</b></a>")
    assert parse_xml(tmp_path / "a.xml").findtext("b") == "x" * 100_000 + "&y"


def test_a_list_that_names_a_missing_file(voc):
    root = voc({"train": [annotation(thing())] * 2, "val": [annotation(thing())]})
    (root / "Annotations" / "train_1.xml").unlink()
    with pytest.raises(ValueError, match=r"train_1\.xml: a list of ImageSets names it"):
        open_data(root, target="instances")


def test_a_folder_that_is_no_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="voc:nowhere: no such folder"):
        open_data("voc:nowhere", target="instances")
    with pytest.raises(ValueError, match="no training annotations; takes Annotations"):
        open_data(f"voc:{tmp_path}", target="instances")
    with pytest.raises(ValueError, match="no folder SegmentationClass"):
        open_data(f"voc:{tmp_path}", target="label_map")


def test_label_maps(voc, encoded):
    root = voc({"train": [annotation()] * 2, "val": [annotation()]})
    (root / "SegmentationClass").mkdir()
    values = np.random.default_rng(0).integers(0, 21, (16, 20), dtype=np.uint8)
    values[0] = 255
    for name in ("train_0", "train_1", "val_0"):
        image = Image.fromarray(values, "P")
        image.putpalette(list(range(256)) * 3)
        image.save(root / "SegmentationClass" / f"{name}.png")
    for split, names in {"train": "train_0\ntrain_1", "val": "val_0"}.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    source = open_data(root, target="label_map")
    assert (source.classes[:2], len(source.classes)) == (["background", "aeroplane"], 21)
    assert np.array_equal(source.splits["train"].target(1), values)
    assert (source.splits["train"].target(1)[0] == IGNORE).all()
    assert len(source.splits["test"]) == 1
