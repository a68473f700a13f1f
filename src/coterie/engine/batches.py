"""What the engine does with a batch, whatever is in it.

A batch is a dictionary. Each of its values has one entry per sample: a tensor by its first dimension, or a list (of
tensors of different sizes, of dictionaries of tensors). `index`, the numbers of the samples in their dataset, is
always there.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from coterie.tasks import Batch


def rows(batch: Batch) -> int:
    """How many samples a batch holds."""
    return len(next(iter(batch.values())))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on `device`, those inside lists and dictionaries too."""
    return {name: _move(value, device) for name, value in batch.items()}


def select(batch: Batch, chosen: Bool[Tensor, " rows"]) -> Batch:
    """The samples where `chosen` is True."""
    if chosen.all():
        return batch
    return {
        name: value[chosen.to(value.device)]
        if isinstance(value, Tensor)
        else [entry for entry, keep in zip(value, chosen.tolist(), strict=True) if keep]
        for name, value in batch.items()
    }


def split(batch: Batch, parts: int) -> list[Batch]:
    """The batch in `parts` batches of nearly equal size, in order; the first ones are the larger."""
    bounds = torch.arange(rows(batch)).tensor_split(parts)
    edges = [(int(part[0]), int(part[-1]) + 1) for part in bounds if len(part)]
    return [{name: value[first:end] for name, value in batch.items()} for first, end in edges]


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _move(entry, device) for key, entry in value.items()}
    return [_move(entry, device) for entry in value] if isinstance(value, list) else value
