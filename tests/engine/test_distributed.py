"""Two processes compute what one computes with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dense_runs import COUNTS, TASKS, dense
from safetensors.torch import load_file
from tiny_run import tiny

from coterie.engine import evaluate, train
from coterie.engine.distributed import make_accelerator
from coterie.engine.logs import read_events


def losses(run_dir: Path, event: str) -> list[float]:
    return [line["loss"] for line in read_events(run_dir) if line["event"] == event]


def launch(script: str, folder: Path) -> str:
    """What two processes that run the script print."""
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        str(Path(__file__).with_name(script)),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    said = launch("two_ranks.py", tmp_path / "two")
    assert said.count("images on 2 x cpu") == 1  # one process speaks
    train(tiny(tmp_path / "one"))
    assert losses(tmp_path / "two", "train") == pytest.approx(losses(tmp_path / "one", "train"), rel=1e-3)
    assert losses(tmp_path / "two", "eval") == pytest.approx(losses(tmp_path / "one", "eval"), rel=1e-2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    name = next(name for name in one if name.endswith("running_mean"))
    np.testing.assert_allclose(two[name], one[name], atol=5e-3)  # Adam makes much of rounding
    predictions = np.load(tmp_path / "two" / "predictions.npz")
    assert predictions["indices"].tolist() == list(range(359))  # the rows that fill up the last batch are gone


@pytest.mark.slow
def test_two_processes_train_dense_tasks(tmp_path: Path) -> None:
    launch("two_ranks_dense.py", tmp_path)
    for task in TASKS:
        run_dir = tmp_path / task
        logged = [event for event in read_events(run_dir) if event["event"] == "eval"][-1]
        alone = evaluate(run_dir, device="cpu")  # the same weights, asked by one process
        assert alone.images == COUNTS["test"]
        for name, value in alone.figures.items():
            tolerance = 0.02 if name == "loss" else 1e-4  # a mean over the pixels of a batch, and batches differ
            assert logged[name] == pytest.approx(value, abs=tolerance), (task, name)
        with np.load(run_dir / "predictions.npz") as stored:
            assert stored["indices"].tolist() == alone.samples["indices"].tolist()
    # Not the same to the bit: means over pixels of halves of a batch, padded to other sizes.
    task = "semantic-segmentation"
    train(dense(task, tmp_path / f"{task}-set", tmp_path / "one"))
    assert losses(tmp_path / task, "train") == pytest.approx(losses(tmp_path / "one", "train"), rel=0.1)


def test_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    with pytest.raises(ValueError, match=r"batch_size is 256, which 3 processes cannot share evenly"):
        make_accelerator(tiny(Path("unused")).train)
