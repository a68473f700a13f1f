"""`coterie inspect`: PNG files and a page, for runs and bare models; one clear line for what cannot be shown."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from inspect_networks import StripeNet
from inspect_pages import check_page
from inspect_runs import write_run
from PIL import Image

from coterie.cli import main
from coterie.inspect.explore import explore, summary
from coterie.inspect.network import Network, open_image, open_model, open_run


def make_network(model=None, classes=("a", "b", "c", "d", "e"), channels: int = 3) -> Network:
    mean = (0.5,) * channels
    model = model or StripeNet(channels)
    return Network(model.eval(), "stripes", (32, 32), channels, mean, mean, list(classes), trained=True)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "a photo.png"
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def test_files_and_page(tmp_path: Path) -> None:
    square, wide = Image.new("RGB", (40, 40), "red"), Image.new("L", (100, 50), 90)
    written = explore(make_network(), [("one.png", square), ("dir two/<b>.jpg", wide)], tmp_path / "out")
    names = {path.name for _, _, files in written.views for path in files}
    assert names == {
        "one-stage1-block1.png", "one-stage2-block1.png", "one-sizes.png",
        "b-stage1-block1.png", "b-stage2-block1.png", "b-sizes.png",
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"index.html"}
    for _, _, files in written.views:
        for path in files:
            Image.open(path).load()
    seen = [view.picture.shape for _, view, _ in written.views]
    assert seen == [(32, 32, 3), (32, 64, 3)]
    page = written.page.read_text()
    check_page(page)
    assert "&lt;b&gt;.jpg" in page
    assert "<b>.jpg" not in page


def test_the_page_carries_what_the_network_did(tmp_path: Path) -> None:
    network = make_network()
    image = Image.new("RGB", (64, 32))
    written = explore(network, [("x.png", image)], tmp_path)
    packed = re.findall(r'<script type="application/json">(.*?)</script>', written.page.read_text())
    (data,) = [json.loads(text) for text in packed]
    view = written.views[0][1]
    for block, heads in zip(data["blocks"], [view.found[:2], view.found[2:]], strict=True):
        assert block["grid"] == list(heads[0].grid)
        for packed_head, head in zip(block["heads"], heads, strict=True):
            assignment = np.frombuffer(base64.b64decode(packed_head["assignment"]), dtype=np.uint8)
            selected = np.frombuffer(base64.b64decode(packed_head["selected"]), dtype="<u2")
            assert np.array_equal(assignment, head.assignment)
            assert np.array_equal(selected.reshape(block["groups"], block["k"]), head.selected)
    assert summary(view)[0].startswith("stage 1, block 1")


def test_grey_networks_get_grey_pictures(tmp_path: Path) -> None:
    written = explore(make_network(channels=1), [("x.png", Image.new("RGB", (50, 50), "blue"))], tmp_path)
    picture = written.views[0][1].picture
    assert (picture[..., 0] == picture[..., 2]).all()


def test_two_pictures_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32))
    written = explore(make_network(), [("a/x.png", image), ("b/x.png", image)], tmp_path)
    assert len({path for _, _, files in written.views for path in files}) == 6


def test_a_network_without_groups_shows_its_answer_and_says_why(tmp_path: Path) -> None:
    from torch import nn

    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 5))
    written = explore(make_network(model), [("x.png", Image.new("RGB", (32, 32)))], tmp_path)
    page = written.page.read_text()
    check_page(page)
    assert "no dynamic groups" in page
    assert "The network says" in page
    assert written.views[0][2] == []


def test_a_bare_model_and_a_picture_of_another_size(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["inspect", "--model", "dgt_nano", str(photo), "--size", "32", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "a photo.png: 48×32 pixels" in said
    assert f"page: {out / 'index.html'}" in said
    check_page((out / "index.html").read_text())
    assert "random weights" in (out / "index.html").read_text()
    assert (out / "a-photo-stage1-block1.png").is_file()


def test_random_weights_are_always_the_same() -> None:
    import torch

    one, two = open_model("dgt_nano"), open_model("dgt_nano")
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_a_network_of_one_size_gets_that_size() -> None:
    import timm

    network = make_network(timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=5))
    network.size = (48, 48)
    assert network.look(Image.new("RGB", (90, 60))).picture.shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "takes a run folder and pictures"),
        (["{tmp}/nothing"], "nothing does not exist"),
        (["{photo}", "{photo}"], "is a file; takes the folder"),
        (["{tmp}"], "is not a run folder"),
        (["{run}", "{tmp}/missing.png"], "missing.png does not exist"),
        (["{run}", "{tmp}"], "is a folder; takes picture files"),
        (["{run}", "{photo}"], "no checkpoint"),
        (["--model", "dgt_nano", "{tmp}/broken.png"], "broken.png"),
        (["--model", "dgt_nano", "{tmp}/words.png"], "words.png: not a picture"),
        (["--model", "dgt_nano", "{tmp}/strip.png"], "cannot be shown"),
        (["--model", "dgt_nano", "{photo}", "--size", "2"], "takes 8 to 4096"),
        (["--model", "dgt_nano", "{photo}", "--out", "{photo}"], "is a file; takes a folder"),
        (["--model", "no_such_model", "{photo}"], "no_such_model"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], words: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    buffer = io.BytesIO()
    Image.open(photo).save(buffer, "png")
    (tmp_path / "broken.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "words.png").write_text("these are words")
    Image.new("RGB", (400, 10)).save(tmp_path / "strip.png")
    run = write_run(tmp_path / "run", classes=["x", "y"], samples=10, epochs=1)
    places = {"tmp": tmp_path, "photo": photo, "run": run}
    assert main(["inspect", *[a.format(**places) for a in arguments]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.startswith("coterie inspect: error: ")
    assert captured.err.count("\n") == 1


def test_open_image_reads_odd_modes(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}"
        Image.new(mode, (9, 7)).save(path)
        assert open_image(path).size == (9, 7)


def test_open_run_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_run(tmp_path / "no")
    with pytest.raises(ValueError, match="not a run folder"):
        open_run(tmp_path)
