"""Biases that are computed once in inference: never those of other weights, never where a gradient is wanted."""

import copy

import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

from coterie.attention._agent_bias import AgentBias
from coterie.attention.long_short_distance import DynamicPositionBias

MAKERS = {
    "agent": lambda: AgentBias(2, 4, (6, 5), prefix_tokens=1),
    "position": lambda: DynamicPositionBias(4, 2),
}


@pytest.fixture(params=MAKERS)
def bias(request):
    torch.manual_seed(0)
    return MAKERS[request.param]().eval()


@torch.no_grad()
def test_it_is_kept_for_its_grid(bias):
    first = bias((3, 4))
    assert bias((3, 4)) is first
    other = bias((4, 3))
    assert other is not first
    assert torch.equal(bias((3, 4)), first)


@pytest.mark.parametrize("change", ["step", "load", "cast", "written through .data", "replaced"])
def test_other_weights_give_another_bias(bias, change):
    with torch.no_grad():
        before = bias((3, 4)).clone()
    bigger = {name: tensor * 2 + 1 for name, tensor in bias.state_dict().items()}
    if change == "step":
        bias((3, 4)).square().sum().backward()
        torch.optim.SGD(bias.parameters(), lr=1.0).step()
    elif change == "load":
        bias.load_state_dict(bigger)
    elif change == "cast":
        bias.double()
    elif change == "replaced":
        bias.load_state_dict(bigger, assign=True)
    else:
        for name, parameter in bias.named_parameters():
            parameter.data = bigger[name]
    with torch.no_grad():
        now = bias((3, 4))
        fresh = copy.deepcopy(bias).train()((3, 4))
    assert torch.equal(now, fresh)
    assert not torch.equal(now, before.to(now.dtype)) or change == "cast"
    assert now.dtype == next(bias.parameters()).dtype


def test_a_gradient_is_never_lost(bias):
    with torch.no_grad():
        bias((3, 4))
    bias((3, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in bias.parameters())


def test_written_in_place_through_data_needs_eval(bias):
    with torch.no_grad():
        before = bias((3, 4)).clone()
        for parameter in bias.parameters():
            parameter.data.add_(1.0)  # tells nobody
        assert not torch.equal(bias.eval()((3, 4)), before)


@torch.no_grad()
def test_a_cast_there_and_back_forgets(bias):
    before = bias((3, 4))
    now = bias.bfloat16().float()((3, 4))
    assert now is not before
    assert torch.equal(now, copy.deepcopy(bias).train()((3, 4)))


@torch.no_grad()
def test_an_ensemble_in_one_call(bias):
    several = [copy.deepcopy(bias) for _ in range(3)]
    for number, one in enumerate(several):
        for parameter in one.parameters():
            parameter.mul_(1 + number)
    weights = stack_module_state(several)
    together = vmap(lambda p, b: functional_call(bias, (p, b), ((3, 4),)))(*weights)
    for one, y in zip(several, together, strict=True):
        torch.testing.assert_close(y, one((3, 4)), rtol=1e-4, atol=1e-6)


def test_in_inference_mode_and_on_the_meta_device(bias):
    with torch.inference_mode():
        born = copy.deepcopy(bias)
        assert torch.equal(born((3, 4)), bias((3, 4)))
    assert bias((3, 4)).requires_grad
    assert copy.deepcopy(bias).to("meta")((3, 4)).is_meta
