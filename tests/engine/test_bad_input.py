"""What goes wrong is said in one clear line, before or at the step where it goes wrong."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import tiny

from coterie.engine import NonFiniteLoss, checkpoint, evaluate, load_run, predict, train
from coterie.engine.files import StorageError
from coterie.tasks.classification import Classification


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model__name": "dgt_nanoo"}, ValueError, "dgt_nano"),
        ({"model__options": {"dimms": [8]}}, ValueError, "dimms"),
        ({"data__source": "folder:/nowhere"}, FileNotFoundError, "/nowhere"),
        ({"data__source": "digitz"}, ValueError, "takes digits"),
        ({"task__name": "clasification"}, ValueError, "did you mean classification"),
        ({"train__precision": "fp16"}, ValueError, "fp16, which needs a GPU"),
        ({"transform__crop": "centre"}, ValueError, "crop"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        train(tiny(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match=r"cannot create .*file/run.*choose another --output\.dir"):
        train(tiny(tmp_path / "file" / "run"))


def test_full_disk_keeps_earlier_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, []

    def full_later(descriptor: int) -> None:
        calls.append(descriptor)
        if (tmp_path / "run" / "checkpoints" / "step-00000005").exists():
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_later)
    with pytest.raises(StorageError, match="No space left on device"):
        train(tiny(tmp_path / "run", train__epochs=3))
    monkeypatch.undo()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000005"]
    assert train(tiny(tmp_path / "run", train__epochs=3), resume=True).step == 15


def test_nan_loss_stops_with_step_checkpoint_and_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, seen = Classification.loss, []

    def loss(self: Classification, model: torch.nn.Module, batch: dict) -> dict:
        result = plain(self, model, batch)
        if model.training:
            seen.append(1)
            if len(seen) == 8:
                result["loss"] = result["loss"] * float("nan")
        return result

    monkeypatch.setattr(Classification, "loss", loss)
    with pytest.raises(NonFiniteLoss, match=r"nan at step 8 of 10; last good checkpoint: .*step-00000005; lower"):
        train(tiny(tmp_path / "run", output__log_every=100))
    last = checkpoint.read_tensors(checkpoint.latest(tmp_path / "run" / "checkpoints"), "model")
    assert all(bool(value.isfinite().all()) for value in last.values())


def test_divergence_in_the_gradient_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"lower optim.lr \(now 1e\+30\), or clip gradients"):
        train(tiny(tmp_path / "run", optim__lr=1e30, optim__clip_norm=0.0, schedule__warmup_epochs=0.0))


@pytest.mark.slow
def test_interrupt_writes_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from coterie.cli import main; sys.exit(main(sys.argv[1:]))",
        "train",
        "--data.source",
        "digits",
        "--transform.image_size",
        "16",
        "--model.name",
        "dgt_pico",
        "--train.device",
        "cpu",
        "--output.dir",
        str(tmp_path / "run"),
        "--output.log_every",
        "1",
        "--train.epochs",
        "100",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert f"coterie train --resume {tmp_path / 'run'}" in out
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == f"step-{step:08d}"


def test_loading_what_is_no_run(tmp_path: Path, finished_run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match=r"weights: got 'last'"):
        load_run(finished_run, weights="last")
    with pytest.raises(ValueError, match=r"split: got 'validation'"):
        evaluate(finished_run, split="validation", device="cpu")


def test_corrupt_images_are_reported_and_the_others_done(tmp_path: Path, finished_run: Path) -> None:
    from PIL import Image

    Image.fromarray(np.full((20, 30, 3), 200, dtype=np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG not really")
    paths = [tmp_path / "bad.png", tmp_path / "good.png", tmp_path / "missing.png"]
    bad, good, missing = predict(finished_run, paths, device="cpu")
    assert bad.error
    assert missing.error
    assert not bad.answers
    assert good.error is None
    assert sum(certainty for _, certainty in good.answers) == pytest.approx(1.0, abs=1e-5)
