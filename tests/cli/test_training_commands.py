"""coterie train, eval, predict and list, as a person types them."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from coterie.cli import main

TINY = [
    "--model.name", "dgt_pico", "--model.options.dims", "[8, 16]", "--model.options.depths", "[1, 1]",
    "--model.options.num_heads", "[1, 2]", "--model.options.attention", "dynamic_group", "--transform.image_size", "16",
    "--train.epochs", "1", "--train.batch_size", "256", "--train.device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *TINY, "--output.dir", str(path), "--no-report"]) == 0
    return path


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    path = tmp_path / "three.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(path)
    return path


def test_train_prints_configuration_progress_and_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--output.dir", str(tmp_path / "run"), "--output.log_every", "1", "--no-report"]) == 0
    out = capsys.readouterr().out
    assert "name: dgt_pico" in out
    assert re.search(r"dgt_pico: [\d,]+ parameters, 5 steps of 256 images on 1 x cpu", out)
    assert re.search(r"epoch 1/1  test: loss [\d.]+  accuracy [\d.]+", out)
    assert f"use it: coterie predict {tmp_path / 'run'} IMAGE" in out
    assert "\x1b" not in out  # plain lines where there is no terminal


def test_train_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("coterie.inspect.report")
    assert main(["train", *TINY, "--output.dir", str(tmp_path / "run")]) == 0
    assert "<html" in (tmp_path / "run" / "report.html").read_text()[:2000].lower()
    assert "report: " in capsys.readouterr().out


def test_train_into_a_run_is_refused_and_resume_goes_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--output.dir", str(run_dir)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("coterie train: error: ")
    assert "already holds a run" in err
    assert err.count("\n") == 1
    assert main(["train", "--resume", str(run_dir), "--no-report"]) == 0
    assert "going on from step 5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.epochz", "3"], "did you mean --train.epochs?"),
        (["--train.epochs", "many"], "train.epochs"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_wrong_arguments_are_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", *arguments])
    err = capsys.readouterr().err
    assert err.startswith("coterie train: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
@pytest.mark.parametrize("order", ["{file} {said}", "{said} {file}"])
def test_what_is_said_prevails_over_a_file_wherever_it_stands(
    order: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: dgt_tiny}\ntrain: {epochs: 9, seed: 4}\n")
    words = order.format(file=form.format(recipe), said="--model dgt_nano --train.epochs 3").split()
    with pytest.raises(SystemExit, match="0"):
        main(["train", *words, "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["model"]["name"], found["train"]["epochs"], found["train"]["seed"]) == ("dgt_nano", 3, 4)


@pytest.mark.parametrize("command", ["train", "eval", "predict", "list"])
def test_help_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert "examples:" in out
    assert f"coterie {command}" in out


def test_eval_prints_figures(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_dir), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("test: 359 samples")
    assert re.search(r"accuracy +0\.\d{4}", out)
    assert "are taken for" in out
    assert main(["eval", str(run_dir), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 359


def test_eval_on_other_pictures_matches_classes_by_name(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("9", "2"):
        for split, count in (("train", 2), ("test", 3)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((9, 9), 25 * int(name), dtype=np.uint8)).save(folder / f"{number}.png")
    assert main(["eval", str(run_dir), "--data", f"folder:{tmp_path / 'photos'}", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("test: 6 samples")
    (tmp_path / "photos" / "train" / "2").rename(tmp_path / "photos" / "train" / "two")
    (tmp_path / "photos" / "test" / "2").rename(tmp_path / "photos" / "test" / "two")
    assert main(["eval", str(run_dir), "--data", f"folder:{tmp_path / 'photos'}", "--device", "cpu"]) == 2
    assert "not trained on: two" in capsys.readouterr().err


def test_predict_shows_a_table(run_dir: Path, digit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run_dir), str(digit), str(digit), "--top", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(rf"{re.escape(str(digit))}( +\d +\d+\.\d%){{2}}", lines[0])


def test_predict_reports_corrupt_images_and_does_the_others(
    run_dir: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(digit.read_bytes()[:50])
    code = main(["predict", str(run_dir), str(tmp_path / "bad.png"), str(digit), "--json", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 1
    bad, good = map(json.loads, out.splitlines())
    assert bad["error"]
    assert len(good["answers"]) == 3
    assert "bad.png" in err


def test_predict_without_a_run(tmp_path: Path, digit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path), str(digit)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_list_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in ("dgt_tiny", "dynamic_group", "dynamic_group_attention", "parquet:PATH", "classification"):
        assert name in out
    assert main(["list", "models"]) == 0
    assert "dgt_nano" in capsys.readouterr().out.split()
    assert main(["list", "attention"]) == 0
    lines = capsys.readouterr().out.splitlines()
    can = next(after for line, after in pairwise(lines) if line.startswith("dynamic_group "))
    assert can.strip() == (
        "1/2/3-dimensional grids; self, cross; padding masks; dynamic_group_attention: triton, cpu, native, reference"
    )
