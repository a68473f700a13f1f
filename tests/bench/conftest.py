"""Shared by the tests of the bench: quick settings, one thread, and a register that forgets."""

from collections.abc import Callable, Iterator

import pytest
import torch

from coterie.bench import BenchOp, Settings, registry


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick() -> Settings:
    return Settings(precision=0.5, time_limit=0.2, most_rounds=6, warmup_seconds=0.0, sample_seconds=0.0)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[BenchOp], BenchOp]:
    """Registers an operation for one test."""
    registry.list_ops()
    monkeypatch.setattr(registry, "_OPS", dict(registry._OPS))
    return registry.register_op
