"""Writes run folders of dense tasks as training leaves them, without training: predictions, log, configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from coterie.data import DataSource, open_data


def write_dense_run(folder: Path, task: str, *, data: str = "digit-scenes", images: int = 12, seed: int = 0) -> Path:
    """A finished run on the first `images` test scenes, right about most of what is in them."""
    target = "label_map" if task == "semantic-segmentation" else "instances"
    source = open_data("digit-scenes", target=target, image_size=64)
    folder.mkdir(parents=True)
    config = {
        "task": {"name": task, "options": {}},
        "model": {"name": "dgt_pico", "options": {}},
        "data": {"source": data},
        "transform": {"image_size": [64, 64]},
        "optim": {"lr": 0.001, "ema_decay": 0.0},
        "train": {"epochs": 2, "batch_size": 8, "seed": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    about = {"name": "digit-scenes", "classes": source.classes, "transform": {}, "target": target}
    (folder / "source.json").write_text(json.dumps(about))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.15.0", "device": "cpu"}))
    rng = np.random.default_rng(seed)
    if target == "label_map":
        figures = {"loss": 0.5, "miou": 0.5, "mean_accuracy": 0.6, "pixel_accuracy": 0.9}
        np.savez(folder / "predictions.npz", **label_maps(source, images, rng))
    else:
        figures = {"ap": 0.5, "ap50": 0.7, "ap75": 0.4, "ap_small": 0.5}
        if task == "instance-segmentation":
            figures |= {f"mask_{name}": value for name, value in figures.items()}
        np.savez(folder / "predictions.npz", **detections(source, images, rng, task == "instance-segmentation"))
    events: list[dict[str, Any]] = []
    for step in (10, 20):
        events.append({"event": "train", "step": step, "epoch": step / 10, "loss": 2 / step, "lr": 1e-3,
                       "images_per_s": 40.0, "grad_norm": 1.0})  # fmt: skip
        events.append({"event": "eval", "step": step, "epoch": step // 10, "split": "test", **figures})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def label_maps(source: DataSource, images: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Confusion matrices of answers in which some pixels became the next class."""
    count, confusions = len(source.classes), []
    for index in range(images):
        truth = source.splits["test"].target(index).astype(np.int64)
        answer = np.where(rng.random(truth.shape) < 0.05 * index / images, (truth + 1) % count, truth)
        confusions.append(np.bincount(truth.ravel() * count + answer.ravel(), minlength=count**2).reshape(count, count))
    return {"indices": np.arange(images), "confusion": np.array(confusions)}


def detections(source: DataSource, images: int, rng: np.random.Generator, masks: bool) -> dict[str, np.ndarray]:
    """The true objects with boxes a little off, some left out, some invented, some of another class."""
    rows: dict[str, list[Any]] = {name: [] for name in ("indices", "boxes", "scores", "labels", "masks", "sizes")}
    for index in range(images):
        target = source.splits["test"].target(index)
        for number in range(len(target)):
            if rng.random() < 0.15:
                continue
            rows["indices"].append(index)
            rows["boxes"].append(target.boxes[number] + rng.normal(0, 1, 4).astype(np.float32))
            rows["scores"].append(rng.uniform(0.3, 1))
            wrong = rng.random() < 0.1
            rows["labels"].append((int(target.labels[number]) + wrong) % len(source.classes))
            rows["masks"].append(target.masks[number]["counts"])
            rows["sizes"].append(target.size)
    kinds = {"indices": np.int64, "boxes": np.float32, "scores": np.float32, "labels": np.int64}
    arrays = {name: np.array(rows[name], dtype=kind) for name, kind in kinds.items()}
    return arrays | ({"masks": np.array(rows["masks"], dtype=bytes), "sizes": np.array(rows["sizes"])} if masks else {})
