"""Fixtures of the engine's tests."""

from pathlib import Path

import pytest
from tiny_run import tiny


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained to its end."""
    from coterie.engine import train

    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny(run_dir, optim__ema_decay=0.5))
    return run_dir
