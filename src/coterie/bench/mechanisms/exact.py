"""Exact attention over all tokens: the entry `global`, and the baseline, inputs and oracle that other entries use."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from coterie.bench.registry import BenchOp, Case, Contender, Inputs, register_op

BASELINE = "scaled_dot_product_attention"


def exact_flops(case: Case, backward: bool) -> int:
    """Exact attention: the products query·key and weights·value over all pairs."""
    forward = 4 * case.batch * case.heads * case.tokens**2 * case.head_dim
    return 3 * forward if backward else forward


def normal(case: Case, *shape: int, stream: int) -> Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(case.seed * 1000 + stream)
    return torch.randn(*shape, generator=generator).to(device=case.torch_device, dtype=case.torch_dtype)


def query_key_value(case: Case) -> Inputs:
    """Normal queries, keys and values."""
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    return {name: normal(case, *shape, stream=i) for i, name in enumerate(("query", "key", "value"))}


def exact_attention_rows(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    rows: Int[Tensor, " rows"],
) -> Float[Tensor, "batch heads rows head_dim"]:
    """Exact attention of some queries, in plain torch."""
    scores = query[:, :, rows] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


def exact_oracle(case: Case, inputs: Inputs, rows: Tensor) -> Tensor:
    """`exact_attention_rows` of a case."""
    return exact_attention_rows(inputs["query"], inputs["key"], inputs["value"], rows)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


EXACT = Contender(BASELINE, _sdpa, "exact attention", exact_flops, growth=2)

_TORCH_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _sdpa_by(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value)


def dense_memory(case: Case) -> int:
    """Scores and weights of all pairs, where an implementation writes them out."""
    return 2 * case.batch * case.heads * case.tokens**2 * case.torch_dtype.itemsize


def _exact_backends(case: Case, backward: bool) -> dict[str, Contender | str]:
    found: dict[str, Contender | str] = {}
    probe = torch.zeros(
        1, 1, 16, case.head_dim, device=case.torch_device, dtype=case.torch_dtype, requires_grad=backward
    )
    for name, backend in _TORCH_BACKENDS.items():
        try:
            _sdpa_by(backend, probe, probe, probe)
        except RuntimeError:
            found[name] = (
                f"torch has no {name} attention for {case.dtype} and head_dim {case.head_dim} on {case.device}"
            )
            continue
        memory = dense_memory if name == "math" else None
        found[name] = Contender(
            name, partial(_sdpa_by, backend), "exact attention", exact_flops, growth=2, memory=memory
        )
    return found


register_op(
    BenchOp(
        name="global",
        summary="exact attention over all tokens, by each of torch's backends",
        options={},
        make_inputs=query_key_value,
        differentiable=("query", "key", "value"),
        baseline=EXACT,
        backends=_exact_backends,
        default_backends=("flash", "efficient", "cudnn"),
        oracles={"exact attention": exact_oracle},
        auto=lambda case, backward: BASELINE,
    )
)
