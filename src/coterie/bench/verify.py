"""The check before the timing: a contender that computes something else, however fast, gets no time.

Forward, at the very shapes that are timed: sampled query rows against the oracle in float64, which plain torch can
    afford at any length because only those rows are computed. Backward, at no more than `GRADIENT_TOKENS` tokens: every
    gradient, in full.

The allowed error is not set by hand: twice the error that the oracle makes when it is computed in the contender's own
    dtype, plus a few units of rounding of the result (where the plain computation happens to be exact, a kernel may
    still round once).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from coterie.bench.registry import BenchOp, Case, Contender, Inputs

SAMPLED_ROWS = 64
GRADIENT_TOKENS = 512
_ROUNDINGS = 8


@dataclass(frozen=True)
class Check:
    """Largest absolute error of one contender, and what it may be; `what` names the output or gradient that is
    worst."""

    what: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # a NaN error does not pass

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        return f"{self.what}: error {self.error:.2e}, allowed {self.budget:.2e}"


def check_forward(op: BenchOp, case: Case, contender: Contender, inputs: Inputs) -> Check:
    """Compare sampled output rows of `contender` with the oracle, at the shapes of the case."""
    queries = inputs["query"].shape[2]
    rows = torch.linspace(0, queries - 1, min(SAMPLED_ROWS, queries), device=inputs["query"].device).long()
    with torch.no_grad():
        output = contender.run(**inputs)[:, :, rows]
        oracle = op.oracles[contender.computes]
        exact = oracle(case, _in_float64(inputs), rows.to(_float64_device(inputs)))
        plain = oracle(case, inputs, rows)
    return _compare("output", output, plain, exact, exact.abs().max().item())


def check_backward(op: BenchOp, case: Case, contender: Contender) -> Check:
    """Compare all gradients of `contender` with the oracle's, at the case's sizes but few tokens; returns the worst."""
    case = replace(case, tokens=min(case.tokens, GRADIENT_TOKENS))
    inputs = op.make_inputs(case)
    rows = torch.arange(case.tokens, device=case.torch_device)
    oracle = op.oracles[contender.computes]

    def plain(**tensors: Tensor) -> Tensor:
        return oracle(case, tensors, rows.to(tensors["query"].device))

    wanted = op.wanted(contender, inputs)
    found = _gradients(wanted, contender.run, inputs, case.torch_dtype)
    low = _gradients(wanted, plain, inputs, case.torch_dtype)
    exact = _gradients(wanted, plain, _in_float64(inputs), case.torch_dtype)
    scale = max(gradient.abs().max().item() for gradient in exact.values())
    checks = [_compare(f"gradient of {name}", found[name], low[name], exact[name], scale) for name in wanted]
    return max(checks, key=lambda check: check.error / check.budget if check.passed else float("inf"))


def backward_call(op: BenchOp, contender: Contender, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """A function that makes one forward and one backward pass and returns the gradients."""
    names = op.wanted(contender, inputs)
    leaves = _leaves(names, inputs)
    wanted = [leaves[name] for name in names]
    upstream: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        output = contender.run(**leaves)
        if not upstream:
            upstream.append(torch.ones_like(output))
        return torch.autograd.grad(output, wanted, upstream[0])

    return call


def _gradients(
    wanted: Sequence[str], run: Callable[..., Tensor], inputs: Inputs, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Gradients under an upstream gradient that differs from element to element, so that a mix-up of rows shows; it is
    rounded to `dtype`, so that every precision gets the same one."""
    leaves = _leaves(wanted, inputs)
    output = run(**leaves)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(output)
    gradients = torch.autograd.grad(output, [leaves[name] for name in wanted], upstream)
    return dict(zip(wanted, gradients, strict=True))


def _leaves(wanted: Sequence[str], inputs: Inputs) -> Inputs:
    return {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}


def _compare(what: str, found: Tensor, plain: Tensor, exact: Tensor, scale: float) -> Check:
    """`scale` is the size of the figures that were added up to get these, which sets the size of a rounding."""
    if found.shape != exact.shape:
        raise ValueError(f"{what} has shape {tuple(found.shape)}, the oracle's has {tuple(exact.shape)}")
    error = (found.to(exact) - exact).abs().max().item()
    plain_error = (plain.to(exact) - exact).abs().max().item()
    return Check(what, error, 2 * plain_error + _ROUNDINGS * torch.finfo(found.dtype).eps * scale)


def _float64_device(inputs: Inputs) -> torch.device:
    device = inputs["query"].device
    return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64


def _in_float64(inputs: Inputs) -> Inputs:
    device = _float64_device(inputs)
    return {name: tensor.to(device).double() for name, tensor in inputs.items()}
