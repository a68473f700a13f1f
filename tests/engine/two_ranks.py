"""Run by two processes (`accelerate launch`): checks batch normalisation over ranks, then trains into a folder."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from timm.layers import BatchNormAct2d
from tiny_run import tiny
from torch import nn

from coterie.engine import train
from coterie.engine.distributed import synchronize_batch_norm


def check_batch_norm(rank: int) -> None:
    """Output, gradients and running buffers equal those of plain batch normalisation over the joint batch."""
    for plain in (nn.BatchNorm2d(6), BatchNormAct2d(6), nn.BatchNorm2d(6, affine=False, momentum=None)):
        torch.manual_seed(0)
        x = torch.randn(5, 6, 3, 4) * 3 + 1  # ranks hold 2 and 3 samples
        weight = torch.randn(5, 6, 3, 4)
        mine = slice(0, 2) if rank == 0 else slice(2, 5)
        synced = synchronize_batch_norm(nn.Sequential(_copy(plain)), torch.device("cpu"))
        joint, local = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
        for _ in range(2):
            expected, got = plain(joint), synced(local)
        torch.testing.assert_close(got, expected[mine], rtol=1e-5, atol=1e-5)
        (expected * weight).sum().backward()
        (got * weight[mine]).sum().backward()
        torch.testing.assert_close(local.grad, joint.grad[mine], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(synced[0].running_var, plain.running_var, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(synced[0].running_mean, plain.running_mean, rtol=1e-5, atol=1e-6)
        assert synced.state_dict().keys() == nn.Sequential(plain).state_dict().keys()
        torch.testing.assert_close(synced.eval()(local), plain.eval()(joint)[mine], rtol=1e-5, atol=1e-5)


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    check_batch_norm(accelerator.process_index)
    result = train(tiny(Path(sys.argv[1])))
    assert result.main == accelerator.is_main_process
    # What the main process finds wrong stops every process, with the same words.
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny(Path(sys.argv[1])))
