"""report.html is whole and right, and stays so when pieces of the run are missing."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from inspect_networks import StripeNet
from inspect_pages import check_page
from inspect_runs import CLASSES, write_run

from coterie.data import open_data
from coterie.inspect.network import Network
from coterie.inspect.report import build_report, headline, training_seconds, write_report
from coterie.inspect.report_groups import choose_samples
from coterie.inspect.runs import read_run

PIECES = ["config.yaml", "metrics.jsonl", "predictions.npz", "environment.json", "source.json"]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a run", classes=[str(n) for n in range(10)], samples=300, data="digits")


def test_a_finished_run(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = path.read_text()
    assert check_page(page) == 24  # twelve mistakes, six narrow and six sure answers, each with its picture
    for heading in ("Overview", "Curves", "Confusion", "Classes", "Examples", "Data", "Setup"):
        assert f">{heading}</h2>" in page
    assert "Loss over the steps" in page
    assert "Learning rate over the steps" in page
    assert f"coterie train --config &#x27;{run_dir}/config.yaml&#x27;" in page
    assert page.count("<svg") >= 6


def test_headline_figures(run_dir: Path) -> None:
    run = read_run(run_dir)
    figures = dict(headline(run))
    with np.load(run_dir / "predictions.npz") as file:
        accuracy = (file["probabilities"].argmax(1) == file["labels"]).mean()
    assert figures["test accuracy"] == f"{accuracy:.2%}"
    assert figures["epochs"] == "8 of 8"
    assert training_seconds(run) == pytest.approx(8 * 60 * 64 / 400, rel=0.05)


def test_group_pictures_of_test_samples(run_dir: Path) -> None:
    network = Network(StripeNet(1).eval(), "stripes", (32, 32), 1, (0.5,), (0.5,), [], trained=True)
    run = read_run(run_dir)
    page = build_report(run, open_data("digits"), network)
    # Of each of three samples two blocks, of each block two heads and six groups, besides the examples.
    assert check_page(page) == 24 + 3 * 2 * (2 + 6)
    assert "parameters" in dict(headline(run, network))
    assert "taken for" in page


def test_chosen_samples_are_two_sure_answers_and_a_mistake(run_dir: Path) -> None:
    run = read_run(run_dir)
    found = run.predictions
    chosen = choose_samples(run, None)
    assert len(chosen) == 3
    right = [bool(found.predicted[i] == found.labels[i]) for i in chosen]
    assert right == [True, True, False]
    assert found.labels[chosen[0]] != found.labels[chosen[1]]


@pytest.mark.parametrize(
    "missing", ["config.yaml", "metrics.jsonl", "predictions.npz", "environment.json", "source.json"]
)
def test_a_missing_piece(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    page = write_report(run_dir).read_text()
    check_page(page)
    words = {
        "config.yaml": "config.yaml is missing",
        "metrics.jsonl": "metrics.jsonl is missing",
        "predictions.npz": "--resume",
        "environment.json": "environment.json is missing",
        "source.json": "stopped before training began",
    }
    assert words[missing] in page


@pytest.mark.parametrize(
    "piece", ["config.yaml", "metrics.jsonl", "predictions.npz", "environment.json", "source.json"]
)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00{", b"[1, 2]", b"{: [", b"PK\x03\x04 not a zip"])
def test_a_damaged_piece(run_dir: Path, piece: str, content: bytes) -> None:
    (run_dir / piece).write_bytes(content)
    check_page(write_report(run_dir).read_text())


def test_predictions_that_do_not_fit_together(run_dir: Path) -> None:
    np.savez(run_dir / "predictions.npz", probabilities=np.ones((3, 2)), labels=np.zeros(4), indices=np.arange(3))
    assert "does not fit together" in write_report(run_dir).read_text()
    np.savez(
        run_dir / "predictions.npz",
        probabilities=np.ones((3, 10)) / 10,
        labels=np.array([1, 99, 2]),
        indices=np.arange(3),
    )
    assert "left out 1 of 3 samples" in write_report(run_dir).read_text()


def test_pickles_are_not_read(run_dir: Path) -> None:
    np.savez(
        run_dir / "predictions.npz", probabilities=np.array([{}], dtype=object), labels=np.zeros(1), indices=np.zeros(1)
    )
    assert "predictions.npz cannot be read" in write_report(run_dir).read_text()


def test_one_class(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", classes=["only"], samples=12, accuracy=1.0)
    page = write_report(run).read_text()
    check_page(page)
    assert "nothing can be confused" in page


def test_a_thousand_classes(tmp_path: Path) -> None:
    names = [f"class <script>{n}</script> & co" for n in range(1000)]
    run = write_run(tmp_path / "run", classes=names, samples=3000, accuracy=0.6)
    page = write_report(run).read_text()
    check_page(page)
    assert "confused most" in page
    assert "The other 940 classes" in page
    assert "<script>7</script>" not in page
    assert len(page) < 2_000_000


def test_no_mistake_at_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", classes=["a", "b", "c"], samples=30)
    chances = np.eye(3)[np.arange(30) % 3]
    np.savez(run / "predictions.npz", probabilities=chances, labels=np.arange(30) % 3, indices=np.arange(30))
    page = write_report(run).read_text()
    check_page(page)
    assert "No test sample was misclassified" in page


def test_data_that_is_not_there(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run")).read_text()
    check_page(page)
    assert "cannot be opened here" in page
    assert "no picture: the data is not at hand" in page


def test_nan_losses_and_a_cut_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "train", "step": 999, "loss": math.nan, "lr": 1e-3}) + '\n{"event": "tr')
    page = write_report(run).read_text()
    check_page(page)
    assert "became NaN or infinite" in page
    assert "left out 1 line that could not be read" in page
    assert not any("nan" in path for path in re.findall(r' (?:d|x|y)="([^"]*)"', page))


def test_a_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=2)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "train", "step": 100, "loss": 7.0}) + "\n")
    train = read_run(run).train
    assert [e["step"] for e in train] == list(range(10, 121, 10))
    assert train[9]["loss"] == 7.0


def test_bad_samples_are_listed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        event = {"event": "data", "step": 480, "bad_samples": {"cats/<1>.png": "image file is truncated"}}
        file.write(json.dumps(event) + "\n")
    page = write_report(run).read_text()
    check_page(page)
    assert "1 sample could not be read" in page
    assert "cats/&lt;1&gt;.png" in page
    assert "image file is truncated" in page


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_report(tmp_path / "no")
    with pytest.raises(ValueError, match=r"not a run folder \(it holds nothing\)"):
        write_report(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write_report(tmp_path / "file")


def test_confusion_counts(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", samples=50))
    matrix = run.predictions.confusion()
    assert matrix.shape == (len(CLASSES), len(CLASSES))
    for true, said in ((0, 0), (1, 2), (4, 5)):
        expected = ((run.predictions.labels == true) & (run.predictions.predicted == said)).sum()
        assert matrix[true, said] == expected
