"""A language model's run that trains in a second: two layers on a few kilobytes of prose."""

from pathlib import Path

from coterie.engine.config import RunConfig, config_from_dict

WORDS = ["the", "a", "quick", "brown", "red", "fox", "dog", "jumps", "sleeps", "over", "under", "happy", "river"]


def write_prose(path: Path, paragraphs: int = 120) -> Path:
    """Paragraphs of random words, the same every time."""
    state, text = 1, []
    for _ in range(paragraphs):
        line = []
        for _ in range(12):
            state = state * 1103515245 + 12345 & 0x7FFFFFFF
            line.append(WORDS[(state >> 16) % len(WORDS)])
        text.append(" ".join(line) + ".\n\n")
    path.write_text("".join(text))
    return path


def language(run_dir: Path, text: Path, **changes: object) -> RunConfig:
    """The configuration; `changes` are dotted names with `__` for the dot."""
    values: dict = {
        "task": {"name": "language-modeling", "options": {"sample_tokens": 12}},
        "model": {
            "name": "dcformer",
            "options": {
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "sliding_window": 8,
            },
        },
        "data": {"source": f"text:{text}"},
        "text": {"tokenizer": "characters", "sequence_length": 32, "separator": "\n\n"},
        "optim": {"lr": 5e-3},
        "train": {"epochs": 2, "batch_size": 16, "device": "cpu"},
        "output": {"dir": str(run_dir), "log_every": 4},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return config_from_dict(values)
