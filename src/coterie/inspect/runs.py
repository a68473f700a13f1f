"""Reads a run folder for the report, whatever is missing from it.

A run that was killed has no predictions, perhaps half a last line in its log; a run from another machine has no data.
Each piece that cannot be read becomes a sentence in `Run.notes` and an empty value; only a folder that is no run is an
error.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

LOG, CONFIG, ENVIRONMENT, SOURCE = "metrics.jsonl", "config.yaml", "environment.json", "source.json"
PREDICTIONS = "predictions.npz"


@dataclass
class Predictions:
    """What the network said about the test split."""

    probabilities: Float[np.ndarray, "samples classes"]
    labels: Int[np.ndarray, " samples"]
    indices: Int[np.ndarray, " samples"]

    @property
    def predicted(self) -> Int[np.ndarray, " samples"]:
        """The class with the highest probability."""
        return self.probabilities.argmax(axis=1)

    @property
    def accuracy(self) -> float:
        """Share of samples whose most probable class is the true one."""
        return float((self.predicted == self.labels).mean())

    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Counts: rows are true classes, columns predicted ones."""
        classes = self.probabilities.shape[1]
        flat = np.bincount(self.labels * classes + self.predicted, minlength=classes * classes)
        return flat.reshape(classes, classes)


@dataclass
class LabelMaps:
    """What the network said about the pixels of each test image: rows are true classes, columns predicted ones."""

    confusions: Int[np.ndarray, "images classes classes"]
    indices: Int[np.ndarray, " images"]

    def confusion(self) -> Int[np.ndarray, "classes classes"]:
        """Pixels of all images."""
        return self.confusions.sum(axis=0)


@dataclass
class Detections:
    """What the network found in the test images: a row for each box, in pixels of the image, left, top, right, bottom.

    `masks` are COCO's compressed run lengths and `sizes` the (height, width) they belong to; None without masks.
    """

    indices: Int[np.ndarray, " boxes"]
    boxes: Float[np.ndarray, "boxes 4"]
    scores: Float[np.ndarray, " boxes"]
    labels: Int[np.ndarray, " boxes"]
    masks: np.ndarray | None = None
    sizes: Int[np.ndarray, "boxes 2"] | None = None


@dataclass
class Run:
    """A run folder, read. Lists and dicts are empty, and what was predicted None, where the piece is missing.

    Of `predictions` (classification), `label_maps` and `detections` a finished run has one.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    predictions: Predictions | None = None
    label_maps: LabelMaps | None = None
    detections: Detections | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def train(self) -> list[dict[str, Any]]:
        """Training log events in the order of their steps, each step once."""
        return self._ordered("train")

    @property
    def evals(self) -> list[dict[str, Any]]:
        """Evaluation log events in the order of their steps, each step once."""
        return self._ordered("eval")

    @property
    def monitored(self) -> str:
        """The split that was evaluated while training: "validation", or "test" where there is no other."""
        return str(self.evals[-1].get("split", "test")) if self.evals else "test"

    @property
    def tested(self) -> dict[str, Any]:
        """The figures of the test split as they were logged last; empty where it was not evaluated."""
        known = [e for e in self.events if e.get("event") in ("eval", "test") and e.get("split", "test") == "test"]
        return known[-1] if known else {}

    @property
    def target(self) -> str:
        """What is known of each picture: "class", "label_map" or "instances"."""
        return str(self.source.get("target", "class"))

    @property
    def data(self) -> str | None:
        """What `coterie.data.open_data` takes to open the run's data, if the configuration says it."""
        spec = self.setting("data.source")
        return spec if isinstance(spec, str) else None

    def _ordered(self, kind: str) -> list[dict[str, Any]]:
        # A resumed run may log again the steps between its last checkpoint and the kill: the later line counts.
        by_step = {e.get("step", i): e for i, e in enumerate(self.events) if e.get("event") == kind}
        return [by_step[step] for step in sorted(by_step, key=lambda s: s if isinstance(s, int | float) else math.inf)]

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of the configuration by its dotted name, `default` where it is not set."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value


def check_run(folder: str | Path) -> Path:
    """`folder` as a path, if it is a run folder.

    Raises:
        FileNotFoundError: there is nothing at that place.
        ValueError: it is a file, or a folder that no training wrote.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"run: {folder} does not exist; takes the folder that `coterie train` wrote")
    if not folder.is_dir():
        raise ValueError(f"run: {folder} is a file; takes the folder that `coterie train` wrote")
    if not any((folder / name).is_file() for name in (LOG, CONFIG)):
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
        raise ValueError(
            f"run: {folder} is not a run folder (it holds {inside}); "
            f"takes a folder with {CONFIG} and {LOG}, as `coterie train` writes it"
        )
    return folder


def read_run(folder: str | Path) -> Run:
    """Everything of a run folder that can be read. Raises as `check_run` does."""
    run = Run(check_run(folder))
    _read_config(run)
    run.environment, run.source = _read_json(run, ENVIRONMENT), _read_json(run, SOURCE)
    _read_log(run)
    _read_predictions(run)
    return run


def _read_config(run: Run) -> None:
    import yaml

    path = run.folder / CONFIG
    if not path.is_file():
        run.notes.append(f"{CONFIG} is missing: the settings of this run are not known.")
        return
    run.config_text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(run.config_text)
    except yaml.YAMLError as error:
        run.notes.append(f"{CONFIG} cannot be parsed: {_one_line(error)}")
        return
    run.config = config if isinstance(config, dict) else {}


def _read_json(run: Run, name: str) -> dict[str, Any]:
    path = run.folder / name
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        run.notes.append(f"{name} cannot be parsed: {_one_line(error)}")
        return {}
    return values if isinstance(values, dict) else {}


def _read_log(run: Run) -> None:
    path = run.folder / LOG
    if not path.is_file():
        run.notes.append(f"{LOG} is missing: there are no curves to draw.")
        return
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if isinstance(event, dict):
            run.events.append(event)
        else:
            broken += 1
    if broken:
        run.notes.append(
            f"{LOG}: left out {broken} line{'s' if broken > 1 else ''} that could not be read "
            "(a killed run can leave half a line)."
        )


def _read_predictions(run: Run) -> None:
    path = run.folder / PREDICTIONS
    if not path.is_file() or run.target == "text":  # of text they hold nothing that the log does not
        return
    try:
        with np.load(path, allow_pickle=False) as file:
            READERS.get(run.target, _read_classes)(run, {name: file[name] for name in file.files})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        run.notes.append(f"{PREDICTIONS} cannot be read: {_one_line(error)}")


def _read_classes(run: Run, arrays: dict[str, np.ndarray]) -> None:
    probabilities = np.asarray(arrays["probabilities"], dtype=np.float32)
    labels = np.asarray(arrays["labels"], dtype=np.int64)
    indices = np.asarray(arrays.get("indices", np.arange(len(labels))), dtype=np.int64)
    if (
        probabilities.ndim != 2
        or labels.shape != probabilities.shape[:1]
        or indices.shape != labels.shape
        or not len(labels)
    ):
        run.notes.append(
            f"{PREDICTIONS} does not fit together: probabilities {probabilities.shape}, labels {labels.shape}, "
            f"indices {indices.shape}."
        )
        return
    inside = (labels >= 0) & (labels < probabilities.shape[1]) & np.isfinite(probabilities).all(axis=1)
    if not inside.all():
        run.notes.append(
            f"{PREDICTIONS}: left out {int((~inside).sum())} of {len(inside)} samples, "
            "whose label is out of range or whose probability is no number."
        )
    if inside.any():
        run.predictions = Predictions(probabilities[inside], labels[inside], indices[inside])


def _read_label_maps(run: Run, arrays: dict[str, np.ndarray]) -> None:
    confusions, indices = arrays["confusion"].astype(np.int64), arrays["indices"].astype(np.int64)
    square = confusions.ndim == 3 and confusions.shape[1] == confusions.shape[2]
    if not square or indices.shape != confusions.shape[:1] or not len(indices):
        shapes = f"confusion {confusions.shape}, indices {indices.shape}"
        run.notes.append(f"{PREDICTIONS} does not fit together: {shapes}.")
        return
    run.label_maps = LabelMaps(confusions, indices)


def _read_detections(run: Run, arrays: dict[str, np.ndarray]) -> None:
    kinds = {"indices": np.int64, "boxes": np.float32, "scores": np.float32, "labels": np.int64}
    found = Detections(**{name: np.asarray(arrays[name], dtype=kind) for name, kind in kinds.items()})
    if "masks" in arrays:
        found.masks, found.sizes = arrays["masks"], arrays["sizes"]
    columns = [values for values in vars(found).values() if values is not None]
    if len({len(values) for values in columns}) > 1 or found.boxes.shape[1:] != (4,):
        shapes = ", ".join(f"{name} {values.shape}" for name, values in vars(found).items() if values is not None)
        run.notes.append(f"{PREDICTIONS} does not fit together: {shapes}.")
        return
    run.detections = found


READERS = {"class": _read_classes, "label_map": _read_label_maps, "instances": _read_detections}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
