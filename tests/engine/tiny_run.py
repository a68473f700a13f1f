"""A run that trains in a second: two dynamic-group stages on 16 x 16 digits, with batch normalisation and centroids."""

from pathlib import Path

from coterie.engine.config import RunConfig, config_from_dict

TINY = {
    "model": {
        "name": "dgt_pico",
        "options": {
            "dims": [8, 16],
            "depths": [1, 1],
            "num_heads": [1, 2],
            "attention": "dynamic_group",
            "attention_options": {"groups": 4, "top_k": 8},
        },
    },
    "transform": {"image_size": 16},
    "optim": {"lr": 3e-3},
    "train": {"epochs": 2, "batch_size": 256, "device": "cpu"},
    "output": {"log_every": 2},
}


def tiny(run_dir: Path, **changes: object) -> RunConfig:
    """The tiny configuration; `changes` are dotted names with `__` for the dot."""
    values = {section: dict(fields) for section, fields in TINY.items()}
    values["output"]["dir"] = str(run_dir)
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return config_from_dict(values)
