"""The one loop that trains and evaluates any task: configuration, checkpoints, resume, progress and logs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.engine.config import RunConfig, load_config
    from coterie.engine.evaluation import Evaluation, Prediction, Predictor, evaluate, predict
    from coterie.engine.loop import RunResult, train
    from coterie.engine.runs import LoadedRun, load_run
    from coterie.engine.window import NonFiniteLoss

# Resolved on first use: `coterie.engine.files` is imported by floors that need neither Accelerate nor jsonargparse.
_HOME = {
    "Evaluation": "evaluation",
    "LoadedRun": "runs",
    "NonFiniteLoss": "window",
    "Prediction": "evaluation",
    "Predictor": "evaluation",
    "RunConfig": "config",
    "RunResult": "loop",
    "evaluate": "evaluation",
    "load_config": "config",
    "load_run": "runs",
    "predict": "evaluation",
    "train": "loop",
}

__all__ = [
    "Evaluation",
    "LoadedRun",
    "NonFiniteLoss",
    "Prediction",
    "Predictor",
    "RunConfig",
    "RunResult",
    "evaluate",
    "load_config",
    "load_run",
    "predict",
    "train",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        return getattr(importlib.import_module(f"coterie.engine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'coterie.engine' has no attribute {name!r}")
