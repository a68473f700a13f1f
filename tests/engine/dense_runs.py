"""Dense runs that train in a few seconds: a narrow network on a few small pictures."""

from pathlib import Path

from dense_sets import write_coco, write_maps

from coterie.engine.config import RunConfig, config_from_dict

COUNTS = {"train": 8, "test": 5}
NARROW = {
    "name": "dgt_pico",
    "options": {
        "dims": [8, 16, 16, 16],
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 2],
        "attention_options": {"groups": 4, "top_k": 8},
    },
}
OPTIONS = {
    "semantic-segmentation": {"decoder": "fpn", "channels": 64, "auxiliary": 0.0},
    "object-detection": {"detector": "fcos", "channels": 32},
    "instance-segmentation": {"channels": 32, "roi_samples": 16, "proposals": 50},
}
TASKS = tuple(OPTIONS)


def write_set(folder: Path, task: str) -> Path:
    """The data set that a task trains on."""
    if folder.exists():
        return folder
    return (write_maps if task == "semantic-segmentation" else write_coco)(folder, COUNTS)


def dense(task: str, data: Path, run_dir: Path, **changes: object) -> RunConfig:
    """A configuration; `changes` are dotted names with `__` for the dot."""
    values: dict = {
        "task": {"name": task, "options": dict(OPTIONS[task])},
        "model": {**NARROW},
        "data": {"source": str(data)},
        "optim": {"lr": 3e-3},
        "train": {"epochs": 2, "batch_size": 4, "device": "cpu"},
        "output": {"dir": str(run_dir), "log_every": 1},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section] = {**values.get(section, {}), key: value} if key else value
    return config_from_dict(values)
