"""coterie train, eval, predict and export for dense tasks, as a person types them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from dense_runs import COUNTS, NARROW, write_set
from PIL import Image

from coterie.cli import main

SEGMENTATION, INSTANCES = "semantic-segmentation", "instance-segmentation"


def pictures(run_dir: Path) -> list[str]:
    folder = run_dir.parent / "set"
    found = sorted([*folder.glob("images/test/*.png"), *folder.glob("test/*.png")])
    return [str(path) for path in found]


def test_train_by_its_short_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_set(tmp_path / "set", "object-detection")
    model = ["--model", NARROW["name"], *(f"--model.options.{key}={value}" for key, value in NARROW["options"].items())]
    run_dir = tmp_path / "run"
    assert main(["train", "--task", "object-detection", "--data", str(data), *model, "--task.options.channels", "32",
                 "--train.epochs", "1", "--train.batch_size", "4", "--train.device", "cpu",
                 "--output", str(run_dir)]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "name: object-detection" in out
    assert re.search(r"epoch 1/1  test: ap \d", out)
    assert f"report: {run_dir / 'report.html'}" in out


def test_a_section_can_still_be_given_as_a_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--task", '{"name": "object-detection"}', "--data=digit-scenes", "--print_config"])
    out = capsys.readouterr().out
    assert "name: object-detection" in out
    assert "source: digit-scenes" in out


def test_an_unknown_task_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task", "segmentation", "--data", "digit-scenes"]) == 2
    err = capsys.readouterr().err
    assert "task: got 'segmentation'" in err
    assert err.count("\n") == 1


def test_eval(dense_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(dense_runs[INSTANCES]), "--device", "cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["samples"] == COUNTS["test"]
    assert {"ap", "mask_ap"} <= figures.keys()
    assert main(["eval", str(dense_runs[SEGMENTATION]), "--device", "cpu"]) == 0
    assert re.search(r"miou +0\.\d{4}", capsys.readouterr().out)


def test_label_maps_are_written_as_pictures_of_class_numbers(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = dense_runs[SEGMENTATION], tmp_path / "out"
    files = pictures(run_dir)
    assert main(["predict", str(run_dir), str(Path(files[0]).parent), "--output", str(out), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("%") >= len(files)
    assert f"label maps: {out / 'label_maps'}" in said
    from coterie.engine import predict

    for file, prediction in zip(files, predict(run_dir, files, device="cpu"), strict=True):
        stored = Image.open(out / "label_maps" / Path(file).name)
        assert stored.mode == "P"
        np.testing.assert_array_equal(np.asarray(stored), prediction.answers["label_map"])
        drawn = Image.open(out / Path(file).name)
        assert max(drawn.size) >= 256  # small pictures are drawn enlarged
    assert json.loads((out / "label_maps" / "classes.json").read_text())[2] == "disc"
    assert not list(out.rglob(".tmp-*"))


def test_the_written_maps_are_a_data_set_again(dense_runs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from coterie.data import open_data

    run_dir = dense_runs[SEGMENTATION]
    given = run_dir.parent / "set" / "images" / "train"
    files = list(given.iterdir())
    assert main(["predict", str(run_dir), str(given), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    shutil.move(tmp_path / "out" / "label_maps", tmp_path / "again" / "labels")
    shutil.copytree(given, tmp_path / "again" / "images")
    shutil.move(tmp_path / "again" / "labels" / "classes.json", tmp_path / "again" / "classes.json")
    source = open_data(f"maps:{tmp_path / 'again'}", target="label_map")
    assert source.classes == ["background", "square", "disc"]
    assert sum(len(split) for split in source.splits.values()) == len(files)


def test_instances_are_written_as_coco(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pycocotools.coco import COCO

    run_dir, out = dense_runs[INSTANCES], tmp_path / "out"
    files = pictures(run_dir)
    assert main(["predict", str(run_dir), *files, "--output", str(out), "--score", "0", "--device", "cpu"]) == 0
    path = out / "predictions.coco.json"
    assert f"file: {path}" in capsys.readouterr().out
    written = COCO(str(path))
    assert [image["file_name"] for image in written.dataset["images"]] == files
    assert {category["name"] for category in written.dataset["categories"]} == {"square", "disc"}
    again = written.loadRes(json.loads(path.read_text())["annotations"])  # as evaluation tools read results
    assert len(again.anns) == len(written.anns) > 0
    for annotation in written.anns.values():
        assert 0 <= annotation["score"] <= 1
        image = written.imgs[annotation["image_id"]]
        mask = written.annToMask(annotation)
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == annotation["area"]


def test_coco_files_take_the_numbers_of_an_annotation_file(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out = dense_runs[INSTANCES], tmp_path / "out"
    files = pictures(run_dir)[:3]
    truth = {
        "images": [{"id": 900 - i, "file_name": f"val/{Path(file).name}"} for i, file in enumerate(files)],
        "categories": [{"id": 17, "name": "disc"}, {"id": 4, "name": "square"}, {"id": 5, "name": "more"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    command = [
        "predict",
        str(run_dir),
        "--output",
        str(out),
        "--device",
        "cpu",
        "--numbers",
        str(tmp_path / "truth.json"),
    ]
    assert main([*command, *files, "--score", "0"]) == 0
    written = json.loads((out / "predictions.coco.json").read_text())
    assert [image["id"] for image in written["images"]] == [900, 899, 898]
    assert {entry["image_id"] for entry in written["annotations"]} <= {900, 899, 898}
    assert {category["name"]: category["id"] for category in written["categories"]} == {"disc": 17, "square": 4}
    assert {entry["category_id"] for entry in written["annotations"]} <= {4, 17} != set()
    capsys.readouterr()

    truth["categories"].pop(0)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert main([*command, *files]) == 2
    assert "truth.json: no category 'disc'; it has more, square" in capsys.readouterr().err
    truth["categories"].append({"id": 1, "name": "disc"})
    truth["images"].pop(0)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    assert main([*command, *files]) == 2
    assert f"no images of the name {Path(files[0]).name}, takes one" in capsys.readouterr().err
    (tmp_path / "truth.json").write_text("[]")
    assert main([*command, *files]) == 2
    assert "truth.json: not a COCO annotation file" in capsys.readouterr().err


def test_scores_below_the_least_are_left_out(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = dense_runs[INSTANCES]
    command = ["predict", str(run_dir), *pictures(run_dir)[:2], "--output", str(tmp_path), "--device", "cpu", "--json"]
    assert main([*command, "--format", "json", "--score", "0"]) == 0
    everything = [json.loads(line)["instances"] for line in capsys.readouterr().out.splitlines()]
    scores = sorted(entry["score"] for entries in everything for entry in entries)
    least = scores[len(scores) // 2]
    assert main([*command, "--format", "json", "--score", str(least)]) == 0
    kept = [json.loads(line)["instances"] for line in capsys.readouterr().out.splitlines()]
    assert 0 < sum(map(len, kept)) < len(scores)
    assert all(entry["score"] >= least - 1e-4 for entries in kept for entry in entries)
    assert [entry["instances"] for entry in json.loads((tmp_path / "predictions.json").read_text())] == kept


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (SEGMENTATION, ["--format", "coco"], "takes png or json"),
        (INSTANCES, ["--format", "png"], "takes coco or json"),
        (INSTANCES, ["--score", "2"], "--score: got 2.0"),
    ],
)
def test_what_predict_refuses(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    task: str, arguments: list[str], message: str,
) -> None:  # fmt: skip
    picture = pictures(dense_runs[task])[0]
    assert main(["predict", str(dense_runs[task]), picture, "--output", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pictures_is_refused(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(dense_runs[SEGMENTATION]), str(tmp_path)]) == 2
    assert "a folder without image files" in capsys.readouterr().err


def test_pictures_of_one_name_do_not_overwrite_each_other(dense_runs: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    run_dir = dense_runs[SEGMENTATION]
    first = pictures(run_dir)[0]
    (tmp_path / "other").mkdir()
    shutil.copy(first, tmp_path / "other")
    second = str(tmp_path / "other" / Path(first).name)
    assert main(["predict", str(run_dir), first, second, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list((tmp_path / "out/label_maps").glob("*.png"))) == 2


@pytest.mark.slow
def test_segmentation_is_exported_and_runs(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import torch

    from coterie.engine import load_run

    run_dir, path = dense_runs[SEGMENTATION], tmp_path / "deep" / "street.onnx"
    assert main(["export", str(run_dir), "--output", str(path), "--size", "32", "48"]) == 0
    out = capsys.readouterr().out
    assert "output  logits (batch, 3, 32, 48)" in out
    assert "onnxruntime agrees with the model" in out
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["background", "square", "disc"]
    run = load_run(run_dir)
    pixels = torch.rand(3, 3, 32, 48)  # another batch than that of the export
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (run.source.transform.mean, run.source.transform.std))
    with torch.no_grad():
        expected = run.model((pixels - mean) / std)
    (got,) = session.run(None, {"image": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_of_a_detector_the_backbone_is_exported(
    dense_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    run_dir = dense_runs[INSTANCES]
    assert main(["export", str(run_dir), "--output", str(tmp_path / "x.onnx")]) == 2
    err = capsys.readouterr().err
    assert "a detector cannot be exported whole" in err
    assert "--part backbone" in err
    assert not (tmp_path / "x.onnx").exists()
    assert main(["export", str(run_dir), "--output", str(tmp_path / "x.onnx"), "--part", "backbone"]) == 0
    assert len(re.findall(r"output  map\d+ ", capsys.readouterr().out)) == 4


def test_classification_has_no_output_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished_classification: Path
) -> None:
    Image.fromarray(np.zeros((9, 9), dtype=np.uint8)).save(tmp_path / "x.png")
    assert main(["predict", str(finished_classification), str(tmp_path / "x.png"), "--output", str(tmp_path)]) == 2
    assert "this run classifies" in capsys.readouterr().err
