"""Writes run folders as training leaves them, without training: curves, predictions, configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_run(
    folder: Path,
    *,
    classes: list[str] = CLASSES,
    samples: int = 600,
    epochs: int = 8,
    steps_per_epoch: int = 60,
    data: str | None = "folder:nowhere",
    accuracy: float = 0.9,
    seed: int = 0,
) -> Path:
    """A finished run whose network is right about `accuracy` of the time and confuses neighbours in number."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": {"name": "dgt_nano", "options": {}},
        "data": {"source": data, "workers": 0},
        "optim": {"lr": 0.001, "ema_decay": 0.0},
        "train": {"epochs": epochs, "batch_size": 64, "seed": 0},
        "output": {"dir": str(folder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "coterie": "0.1.0",
        "torch": "2.15.0",
        "device": "cpu",
        "cpu_cores": 2,
        "command": "coterie train --train.epochs 8",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "source.json").write_text(json.dumps({"name": "things", "classes": classes, "transform": {}}))
    events, total = [], epochs * steps_per_epoch
    for step in range(10, total + 1, 10):
        done = step / total
        loss = 2.3 * np.exp(-3.2 * done) + 0.25 + rng.normal() * 0.06
        rate = 1e-3 * min(1, step / steps_per_epoch) * (0.5 + 0.5 * np.cos(np.pi * done))
        events.append({"event": "train", "step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": rate,
                       "images_per_s": 400 + rng.normal() * 12, "grad_norm": 1 + abs(rng.normal())})  # fmt: skip
        if step % steps_per_epoch == 0:
            reached = accuracy * (1 - np.exp(-4 * done))
            events.append({"event": "eval", "step": step, "epoch": step // steps_per_epoch, "split": "test",
                           "loss": 2.2 * np.exp(-2.6 * done) + 0.35, "accuracy": reached,
                           "macro_accuracy": reached - 0.01, "top5_accuracy": min(reached + 0.08, 1)})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    count = len(classes)
    labels = rng.integers(0, count, samples)
    said = np.where(rng.random(samples) < accuracy, labels, (labels + rng.choice([1, 1, 1, 2, 5], samples)) % count)
    logits = rng.normal(size=(samples, count))
    logits[np.arange(samples), said] += rng.uniform(3, 9, samples)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.savez_compressed(
        folder / "predictions.npz", probabilities=chances.astype(np.float16), labels=labels, indices=np.arange(samples)
    )
    return folder
