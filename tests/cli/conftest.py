"""The dense runs of the engine's tests, for the commands."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from dense_runs import dense, write_set


@pytest.fixture(scope="session")
def dense_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by task, each with the folder of its data beside it, named `set`."""
    from coterie.engine import train

    folders = {}
    for task in ("semantic-segmentation", "instance-segmentation"):
        folder = tmp_path_factory.mktemp(task)
        train(dense(task, write_set(folder / "set", task), folder / "run", train__epochs=1))
        folders[task] = folder / "run"
    return folders


@pytest.fixture(scope="session")
def finished_classification(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of classification trained to its end."""
    from tiny_run import tiny

    from coterie.engine import train

    run_dir = tmp_path_factory.mktemp("classification") / "run"
    train(tiny(run_dir, train__epochs=1))
    return run_dir
