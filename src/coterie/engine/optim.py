"""The optimizer and the course of the learning rate.

The learning rate is a pure function of the step, so a resumed run needs no schedule state to go on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import nn

from coterie.engine.config import OptimConfig, ScheduleConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW in two groups: matrices and kernels decay; one-dimensional parameters, biases and those named by
    `model.no_weight_decay()` do not. Buffers (running statistics, centroids) are in neither."""
    from timm.optim import param_groups_weight_decay

    named: Callable[[], Collection[str]] | None = getattr(model, "no_weight_decay", None)
    spared = named() if named else ()
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    lr = config.lr or 0.0  # where it is open: the schedule sets the rate before every step anyway
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, weight_decay=0.0, fused=True)


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Learning rate of 0-based `step` out of `steps`: linear up to `peak`, then half a cosine to its final share."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (schedule.final_share + (1 - schedule.final_share) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the learning rate `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
