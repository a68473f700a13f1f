"""Which parameters decay, and the course of the learning rate."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from coterie.engine.config import OptimConfig, ScheduleConfig
from coterie.engine.optim import build_optimizer, learning_rate


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.temperature = nn.Parameter(torch.zeros(4, 1, 1))
        self.fc = nn.Linear(4, 2)
        self.register_buffer("centroids", torch.randn(2, 4, 8))

    def no_weight_decay(self) -> set[str]:
        return {"temperature"}


def test_decay_spares_norms_biases_and_named_parameters_and_takes_no_buffer() -> None:
    network = Network()
    optimizer = build_optimizer(network, OptimConfig(weight_decay=0.1))
    names = {parameter: name for name, parameter in network.named_parameters()}
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    spared = {names[p] for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert decayed == {"conv.weight", "fc.weight"}
    assert spared == {"conv.bias", "norm.weight", "norm.bias", "temperature", "fc.bias"}


def test_centroids_of_the_real_model_are_not_optimised() -> None:
    import coterie

    model = coterie.create_model("dgt_pico", num_classes=2, in_chans=1)
    optimizer = build_optimizer(model, OptimConfig())
    optimised = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert optimised == sum(p.numel() for p in model.parameters())
    assert any(name.endswith("centroids") for name, _ in model.named_buffers())


def test_learning_rate_warms_up_peaks_and_falls_to_its_final_share() -> None:
    schedule = ScheduleConfig(final_share=0.1)
    rates = [learning_rate(step, 100, 10, 1.0, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.1)
    assert learning_rate(0, 5, 10, 1.0, schedule) > 0  # a warm-up longer than the run
