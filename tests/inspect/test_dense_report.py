"""report.html of dense runs: whole and right, and still there when pieces are missing."""

from pathlib import Path

import numpy as np
import pytest
from dense_runs import dense, write_set
from inspect_dense import write_dense_run
from inspect_pages import check_page

from coterie.cli import main
from coterie.inspect.report import headline, write_report
from coterie.inspect.runs import read_run

TASKS = ("semantic-segmentation", "object-detection", "instance-segmentation")


@pytest.fixture(params=TASKS)
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_dense_run(tmp_path / "run", request.param)


def test_every_part_is_there(run_dir: Path) -> None:
    page = write_report(run_dir).read_text()
    pictures = check_page(page)
    for heading in ("Overview", "Curves", "Classes", "Examples", "Data", "Setup"):
        assert f">{heading}</h2>" in page
    assert "on <b>digit-scenes</b>" in page
    run = read_run(run_dir)
    if run.target == "label_map":
        assert ">Confusion</h2>" in page
        assert "Mean IoU on the test split" in page
        assert pictures == 0  # the answers are the network's, and there is none
        assert "no picture: the network is not at hand" in page
        return
    assert ">Precision and recall</h2>" in page
    assert "All classes, boxes" in page
    assert ("All classes, masks" in page) == (run.detections.masks is not None)
    assert pictures == 2 * 12  # twelve images, the truth and the answer of each
    assert "AP50" in page


def test_headline(run_dir: Path) -> None:
    figures = dict(headline(read_run(run_dir)))
    task = read_run(run_dir).setting("task.name")
    assert {"semantic-segmentation": "test mean IoU", "object-detection": "test box AP",
            "instance-segmentation": "test mask AP"}[task] in figures  # fmt: skip
    assert figures["epochs"] == "2 of 2"


def test_class_figures_are_those_of_the_confusion_matrix(tmp_path: Path) -> None:
    from coterie.inspect.segmentation import class_figures, image_scores

    found = read_run(write_dense_run(tmp_path / "run", TASKS[0])).label_maps
    overlap, recall, precision = class_figures(np.array([[8, 2, 0], [1, 4, 0], [0, 0, 0]]))
    assert overlap[:2].tolist() == pytest.approx([8 / 11, 4 / 7])
    assert recall[:2].tolist() == pytest.approx([0.8, 0.8])
    assert precision[:2].tolist() == pytest.approx([8 / 9, 4 / 6])
    assert np.isnan(overlap[2])
    scores = image_scores(found)
    assert scores[0] == 1  # the first answer has no error, later ones have more
    assert scores[-1] < 0.95


@pytest.mark.parametrize("missing", ["config.yaml", "predictions.npz", "metrics.jsonl", "environment.json"])
def test_a_missing_piece(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    page = write_report(run_dir).read_text()
    check_page(page)
    assert missing in page or missing == "predictions.npz"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip"])
def test_damaged_predictions(run_dir: Path, content: bytes) -> None:
    (run_dir / "predictions.npz").write_bytes(content)
    page = write_report(run_dir).read_text()
    check_page(page)
    assert "predictions.npz cannot be read" in page


def test_predictions_that_do_not_fit_together(run_dir: Path) -> None:
    with np.load(run_dir / "predictions.npz") as file:
        arrays = dict(file)
    arrays["indices"] = arrays["indices"][:-1]
    np.savez(run_dir / "predictions.npz", **arrays)
    page = write_report(run_dir).read_text()
    check_page(page)
    assert "does not fit together" in page


def test_data_that_is_not_there(tmp_path: Path) -> None:
    for task in TASKS:
        page = write_report(write_dense_run(tmp_path / task, task, data="coco:/nowhere")).read_text()
        check_page(page)
        assert "cannot be opened here" in page


def test_data_that_is_another(tmp_path: Path) -> None:
    run_dir = write_dense_run(tmp_path / "run", "object-detection")
    with np.load(run_dir / "predictions.npz") as file:
        arrays = dict(file)
    arrays["indices"] = arrays["indices"] + 10_000
    np.savez(run_dir / "predictions.npz", **arrays)
    page = write_report(run_dir).read_text()
    check_page(page)
    assert "The detections do not fit the data" in page


def test_nothing_was_detected(tmp_path: Path) -> None:
    run_dir = write_dense_run(tmp_path / "run", "object-detection")
    empty = {"indices": np.zeros(0, np.int64), "boxes": np.zeros((0, 4), np.float32),
             "scores": np.zeros(0, np.float32), "labels": np.zeros(0, np.int64)}  # fmt: skip
    np.savez(run_dir / "predictions.npz", **empty)
    page = write_report(run_dir).read_text()
    check_page(page)
    assert "missed; 0 wrong detections" in page


@pytest.mark.slow
@pytest.mark.parametrize("task", ["semantic-segmentation", "instance-segmentation"])
def test_a_trained_run_shows_answers_groups_and_can_be_inspected(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from coterie.engine import train

    data = write_set(tmp_path / "set", task)
    train(dense(task, data, tmp_path / "run", train__epochs=1))
    page = write_report(tmp_path / "run").read_text()
    assert check_page(page) > 2 * 5 + 8  # five test images with their answers, and tiles of groups
    assert ">Groups</h2>" in page
    assert "no picture" not in page
    picture = next(iter((data / "images" / "test" if task == "semantic-segmentation" else data / "test").glob("*.png")))
    for arguments in ([str(picture)], []):
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / "run"), *arguments, "--out", str(tmp_path / "out")]) == 0
        assert "stage 1, block 1" in capsys.readouterr().out
        inspected = (tmp_path / "out" / "index.html").read_text()
        check_page(inspected)
        assert "with the answer" in inspected
