"""A run that is killed with SIGKILL, again and again, ends with the very weights of the unbroken run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny

from coterie.engine import checkpoint, train
from coterie.engine.logs import read_events

KILLING = Path(__file__).with_name("killing.py")


def run_and_kill(run_dir: Path, *moments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(KILLING), str(run_dir), *moments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained(run_dir: Path) -> dict[str, bytes]:
    """Everything that training made, as bytes."""
    last = checkpoint.latest(run_dir / "checkpoints")
    assert last is not None
    files = [*last.glob("*.safetensors"), last / "state.json", run_dir / "model.safetensors"]
    contents = {path.name + ("" if path.parent == last else " at the end"): path.read_bytes() for path in files}
    predictions = np.load(run_dir / "predictions.npz")
    return contents | {name: predictions[name].tobytes() for name in predictions.files}


def logged(run_dir: Path) -> list[dict]:
    """Events without what depends on the clock."""
    return [{key: value for key, value in event.items() if key != "images_per_s"} for event in read_events(run_dir)]


@pytest.mark.slow
def test_killed_runs_end_bit_for_bit_as_the_unbroken_one(tmp_path: Path) -> None:
    run_and_kill(tmp_path / "unbroken")
    moments = ("start", "step:3", "writing", "step:6", "writing", "step:12", "finishing")
    out = run_and_kill(tmp_path / "broken", *moments)
    assert out.count("killed at") == len(moments)
    unbroken, broken = trained(tmp_path / "unbroken"), trained(tmp_path / "broken")
    assert set(unbroken) == set(broken) >= {"model.safetensors", "average.safetensors", "optimizer.safetensors"}
    assert [name for name in unbroken if unbroken[name] != broken[name]] == []
    assert logged(tmp_path / "unbroken") == logged(tmp_path / "broken")  # no event doubled, none lost
    assert not list((tmp_path / "broken").rglob(".tmp-*"))


def test_half_written_and_damaged_checkpoints_are_ignored(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "checkpoints"
    shutil.copytree(finished_run / "checkpoints", folder)
    whole = checkpoint.latest(folder)
    (folder / "step-00000098").mkdir()
    shutil.copytree(whole, folder / "step-00000099")
    with open(folder / "step-00000099" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    shutil.copytree(whole, folder / ".tmp-step-00000100-1")
    assert checkpoint.latest(folder) == whole


def test_resume_of_a_finished_run_changes_nothing(finished_run: Path) -> None:
    before, events = trained(finished_run), read_events(finished_run)
    result = train(tiny(finished_run, optim__ema_decay=0.5), resume=True)
    assert trained(finished_run) == before
    assert read_events(finished_run) == events
    assert result.metrics["accuracy"] == pytest.approx(events[-1]["accuracy"])


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(tiny(tmp_path / "nothing"), resume=True)


def test_a_second_run_in_the_folder_is_refused_and_overwritten_on_request(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a run; go on with it by --resume"):
        train(tiny(folder))
    assert trained(folder) == trained(finished_run)
    train(tiny(folder, output__overwrite=True, train__epochs=1))
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_log_keeps_only_what_the_checkpoint_knows(tmp_path: Path) -> None:
    from coterie.engine.logs import Logs

    logs = Logs(tmp_path, after_step=0)
    for step in range(1, 6):
        logs.write("train", step, step / 2, loss=1.0 / step)
    logs.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # a kill in the middle of a line
    Logs(tmp_path, after_step=3).close()
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2, 3]


def test_damaged_checkpoint_is_written_again_and_a_whole_one_is_left(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "checkpoints"
    shutil.copytree(finished_run / "checkpoints", folder)
    last = checkpoint.latest(folder)
    tensors = {"model": checkpoint.read_tensors(last, "model")}
    whole = (last / "average.safetensors").stat().st_mtime_ns
    checkpoint.save(folder, 10, tensors, {})
    assert (last / "average.safetensors").stat().st_mtime_ns == whole
    (last / "optimizer.safetensors").unlink()
    assert checkpoint.latest(folder) != last
    checkpoint.save(folder, 10, tensors, {})
    assert checkpoint.latest(folder) == last
    assert {path.name for path in last.iterdir()} == {"model.safetensors", "state.json"}


def test_another_model_s_checkpoint_is_refused(finished_run: Path) -> None:
    from torch import nn

    tensors = checkpoint.read_tensors(checkpoint.latest(finished_run / "checkpoints"), "model")
    with pytest.raises(ValueError, match=r"weights does not fit the model: it lacks weight and 1 more; it has "):
        checkpoint.load_weights(nn.Linear(2, 2), tensors, Path("weights"))
    with pytest.raises(ValueError, match="size mismatch for weight"):
        checkpoint.load_weights(nn.Linear(2, 2), nn.Linear(3, 2).state_dict(), Path("weights"))
