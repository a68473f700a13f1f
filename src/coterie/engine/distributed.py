"""Several processes as one: devices by Accelerate, batch statistics over all ranks, random numbers by step.

A run of N processes computes the same loss curve as one process with the same global batch, so batch normalisation uses
the statistics of the global batch. `torch.nn.SyncBatchNorm` does that on GPUs and refuses CPUs; `AllReduceBatchNorm`
is the same arithmetic on differentiable all-reduces and runs anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

    from coterie.engine.config import TrainConfig

Result = TypeVar("Result")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of this process: its rank, device and precision.

    Raises:
        ValueError: fp16 without a GPU, or a batch that the processes cannot share evenly.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs

    AcceleratorState._reset_state()  # the precision of an earlier run in this process must not stick
    # Buffers are equal on all ranks by construction (statistics are reduced), so DDP need not broadcast them each step.
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=config.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.precision is fp16, which needs a GPU; on a CPU take no or bf16")
    if config.batch_size is not None and config.batch_size % accelerator.num_processes:
        raise ValueError(f"train.batch_size is {config.batch_size}, which {accelerator.num_processes} processes "
                         "cannot share evenly; take a multiple")  # fmt: skip
    return accelerator


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set every global random state to a function of (seed, step, rank).

    Drop-path, dropout, mixup and whatever else draws during a step then need no saved state: a run that is resumed at a
    step draws what the unbroken run drew.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))  # noqa: NPY002  timm's Mixup draws from the global generator
    torch.manual_seed(int(words[1]))


def on_main(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Do `action` on the main rank alone; every rank gets its result, or raises the error that it met.

    So none waits for one that has stopped.
    """
    if accelerator.num_processes == 1:
        return action()
    from accelerate.utils import broadcast_object_list

    shared: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            shared[0] = action()
        except (OSError, ValueError) as error:
            shared[1] = error
    broadcast_object_list(shared)
    if shared[1] is not None:
        raise shared[1]
    return shared[0]


def mean_over_ranks(accelerator: Accelerator, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Elementwise mean over all processes."""
    return accelerator.reduce(values, reduction="mean") if accelerator.num_processes > 1 else values


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any process."""
    if accelerator.num_processes == 1:
        return flag
    count = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum")
    return bool(count.item() > 0)


class AllReduceBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of all ranks; equals plain batch normalisation over the joint batch.

    Takes the place of `nn.BatchNorm{1,2,3}d` and of timm's fused norm-and-activation modules, whose `drop` and `act`
    follow the normalisation. Input (batch, channels, ...); ranks may hold batches of different sizes.
    """

    def __init__(self, source: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats)
        self._parameters.update(source._parameters)
        self._buffers.update(source._buffers)
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())
        self.train(source.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch normalisation takes (batch, channels, ...), got {tuple(input.shape)}")

    def forward(self, input: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        if not self.training:
            return self.act(self.drop(super().forward(input)))
        from torch.distributed.nn.functional import all_reduce

        self._check_input_dim(input)
        x = input.float()
        others = [axis for axis in range(x.ndim) if axis != 1]
        column = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() / x.shape[1]
        total = all_reduce(torch.cat([x.sum(others), x.new_tensor([count])]))
        sums, number = total[:-1], total[-1].detach()
        mean = sums / number
        centred = x - mean.view(column)
        variance = all_reduce(centred.square().sum(others)) / number
        with torch.no_grad():
            self._update_running(mean, variance, number)
        y = centred * torch.rsqrt(variance + self.eps).view(column)
        if self.affine:
            y = y * self.weight.view(column) + self.bias.view(column)
        return self.act(self.drop(y.to(input.dtype)))

    def _update_running(self, mean: Tensor, variance: Tensor, number: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        weight = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * (number / (number - 1)), weight)


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch normalisation in `model` use the statistics of all ranks; its state dict stays the same."""
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    if isinstance(model, nn.modules.batchnorm._BatchNorm):
        return AllReduceBatchNorm(model)
    for name, child in model.named_children():
        setattr(model, name, synchronize_batch_norm(child, device))
    return model
