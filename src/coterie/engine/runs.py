"""The run folder: opening it for a new or a resumed run, and loading a trained model back from it.

config.yaml        the configuration (see `config`)
source.json        classes, channels and normalisation of the pictures: what prediction needs without the data
tokenizer.json     of a language model
environment.json   versions and hardware of the latest start
metrics.jsonl      the log of events            tensorboard/   the same for TensorBoard
checkpoints/       see `checkpoint`
model.safetensors  the weights at the end (their moving average, where the run keeps one)
predictions.npz    what the model said about each sample of the test split
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import coterie
from coterie.data.text import TextFacts
from coterie.data.tokenizers import TextTokenizer, load_tokenizer
from coterie.data.transforms import TransformConfig
from coterie.engine import checkpoint
from coterie.engine.config import RunConfig, dump_config, load_config, merge_for_resume
from coterie.engine.files import StorageError, atomic_write, remove_leftovers
from coterie.tasks import Task, create_task

TOKENIZER = "tokenizer.json"


@dataclass
class SourceInfo:
    """What of a data source a trained model has to remember.

    Attributes:
        name: The data that the model was trained on.
        classes: Class names in the order of the labels.
        transform: What is done to pictures, with nothing left open.
        target: What is known of each picture: `class`, `label_map` or `instances`; or `text`.
        text: Of text: vocabulary, rows, sizes.
        tokenizer: Of text.
    """

    name: str
    classes: list[str]
    transform: TransformConfig
    target: str = "class"
    text: TextFacts | None = None
    tokenizer: TextTokenizer | None = None

    @property
    def channels(self) -> int:
        """Channels of the pictures that the model takes."""
        return self.transform.channels or 3


@dataclass
class LoadedRun:
    """A trained model, ready to use: `model` is in eval mode."""

    run_dir: Path
    config: RunConfig
    task: Task
    model: nn.Module
    source: SourceInfo
    step: int


def resolve_run(config: RunConfig, resume: bool) -> RunConfig:
    """The configuration to train with; looks at the run folder and writes nothing.

    Raises:
        ValueError: a new run in a folder that holds one, or a resumed run with another configuration.
        FileNotFoundError: resume, and there is no run.
    """
    run_dir = config.run_dir
    saved = run_dir / "config.yaml"
    if resume:
        if not saved.is_file():
            raise FileNotFoundError(f"{run_dir} holds no run to resume; leave out --resume to start one")
        config = merge_for_resume(load_config(saved), config)
    elif saved.exists() and not config.output.overwrite:
        raise ValueError(f"{run_dir} already holds a run; go on with it by --resume, replace it by "
                         "--output.overwrite true, or choose another --output.dir")  # fmt: skip
    config.output.dir = str(run_dir)
    return config


def create_run(config: RunConfig, resume: bool) -> None:
    """Make the run folder, or clear it for a new run where that was asked for, and write the configuration.

    Raises:
        StorageError: the folder cannot be written.
    """
    run_dir = config.run_dir
    _check_writable(run_dir)
    if not resume:
        _delete_run(run_dir)
    remove_leftovers(run_dir)
    try:
        (run_dir / "checkpoints").mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {run_dir}: {error.strerror}; choose another --output.dir") from error
    remove_leftovers(run_dir / "checkpoints")
    atomic_write(run_dir / "config.yaml", dump_config(config))


def _delete_run(run_dir: Path) -> None:
    """Delete what a run writes, and nothing else that the folder may hold."""
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    names = ("config.yaml", "source.json", "environment.json", "metrics.jsonl", "model.safetensors", "predictions.npz",
             "report.html", "tokenizer.json")  # fmt: skip
    for name in names:
        (run_dir / name).unlink(missing_ok=True)


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot create {run_dir}: {error.strerror}; choose another --output.dir") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write {run_dir}: Permission denied; choose another --output.dir")


def write_source(run_dir: Path, info: SourceInfo) -> None:
    """Remember the data source in the run folder."""
    values = {field.name: getattr(info, field.name) for field in fields(info) if field.name != "tokenizer"}
    values |= {"transform": asdict(info.transform), "text": asdict(info.text) if info.text else None}
    if info.tokenizer:
        atomic_write(run_dir / TOKENIZER, info.tokenizer.to_json())
    atomic_write(run_dir / "source.json", json.dumps(values, indent=1))


def read_source(run_dir: Path) -> SourceInfo:
    """The data source that the run remembers."""
    values = json.loads((run_dir / "source.json").read_text())
    transform: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values["transform"].items()
    }
    text = TextFacts(**values["text"]) if values.get("text") else None
    tokenizer = read_tokenizer(run_dir, text.kind) if text else None
    return SourceInfo(
        values["name"], values["classes"], TransformConfig(**transform), values.get("target", "class"), text, tokenizer
    )


def read_tokenizer(run_dir: Path, kind: str) -> TextTokenizer:
    """The tokenizer that the run keeps. Raises FileNotFoundError or ValueError where it is missing or damaged."""
    path = run_dir / TOKENIZER
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the run's tokens mean nothing without it")
    return load_tokenizer(kind, path.read_text("utf-8"), str(path))


def make_task(config: RunConfig, info: SourceInfo) -> Task:
    """The task of a run, for its data."""
    known = {"text": info.text, "tokenizer": info.tokenizer} if info.text else {}
    return create_task(config.task.name, classes=info.classes, augment=config.augment, **known, **config.task.options)


def write_environment(run_dir: Path, device: torch.device, processes: int) -> None:
    """Remember versions and hardware in the run folder."""
    import timm

    values = {
        "coterie": coterie.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    atomic_write(run_dir / "environment.json", json.dumps(values, indent=1))


def load_run(run_dir: str | Path, weights: str = "final") -> LoadedRun:
    """Load the model of a run.

    Args:
        run_dir: The run folder.
        weights: `final` (where the run is not finished, its latest checkpoint) or `best` (by the task's main metric).
            Either is the moving average of the weights where the run keeps one.

    Raises:
        FileNotFoundError: no run in the folder, or no weights yet.
        ValueError: the weights do not fit the model, or an unknown `weights`.
    """
    run_dir = Path(run_dir)
    if weights not in ("final", "best"):
        raise ValueError(f"weights: got {weights!r}, takes 'final' or 'best'")
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir} holds no run (no config.yaml in it)")
    if not (run_dir / "source.json").is_file():
        raise FileNotFoundError(f"the run in {run_dir} stopped before training began; there are no weights in it")
    config, source = load_config(run_dir / "config.yaml"), read_source(run_dir)
    task = make_task(config, source)
    model = task.build_model(config.model, source)
    path, step, tensors = _find_weights(run_dir, weights)
    checkpoint.load_weights(model, tensors, path)
    return LoadedRun(run_dir, config, task, model.eval(), source, step)


def _find_weights(run_dir: Path, weights: str) -> tuple[Path, int, dict[str, Any]]:
    folder = checkpoint.latest(run_dir / "checkpoints")
    state = checkpoint.read_state(folder) if folder else None
    final = run_dir / "model.safetensors"
    if weights == "final" and final.is_file():
        return final, state["step"] if state else 0, load_file(final)
    if folder is None or state is None:
        raise FileNotFoundError(f"the run in {run_dir} has no checkpoint yet")
    if weights == "best":
        if not state.get("best"):
            raise FileNotFoundError(f"the run in {run_dir} has not been evaluated yet, so none of it is the best")
        folder = run_dir / "checkpoints" / f"step-{state['best']['step']:08d}"
        state = checkpoint.read_state(folder)
        if state is None:
            raise FileNotFoundError(f"the best checkpoint, {folder}, is missing or damaged; take --weights final")
    tensors = checkpoint.read_tensors(folder, "average") or checkpoint.read_tensors(folder, "model")
    return folder, state["step"], tensors or {}


def run_tokenizer(run_dir: Path) -> TextTokenizer | None:
    """The tokenizer of a run that goes on; None where it stopped before there was one, and of runs on pictures."""
    if not (run_dir / "source.json").is_file():
        return None
    return read_source(run_dir).tokenizer
