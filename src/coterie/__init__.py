"""Structured attention for PyTorch, and the transformers built on it.

The floors, from the ground up: `coterie.ops` (the arithmetic), `coterie.attention` (the mechanisms), `coterie.models`
(the architectures), `coterie.tasks`, `coterie.data`, `coterie.engine` (training), `coterie.bench`, `coterie.inspect`
and the `coterie` command. Everything is loaded on first use, so `import coterie` costs little beyond torch itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

from coterie._version import __version__

if TYPE_CHECKING:
    from coterie.attention import follow_learning_rate, replace_attention
    from coterie.models import create_model
    from coterie.ops import dynamic_group_attention, dynamic_groups, explain, grouped_attention

_HOME = {
    "create_model": "coterie.models",
    "dynamic_group_attention": "coterie.ops",
    "dynamic_groups": "coterie.ops",
    "explain": "coterie.ops",
    "follow_learning_rate": "coterie.attention",
    "grouped_attention": "coterie.ops",
    "replace_attention": "coterie.attention",
}
_ROOMS = ("ops", "layers", "attention", "models", "tasks", "data", "engine", "bench", "inspect", "testing")

__all__ = [
    "__version__",
    "create_model",
    "dynamic_group_attention",
    "dynamic_groups",
    "explain",
    "follow_learning_rate",
    "grouped_attention",
    "replace_attention",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"coterie.{name}")
    raise AttributeError(f"module 'coterie' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_ROOMS})
