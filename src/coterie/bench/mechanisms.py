"""The measured operations, one entry each; see `registry.BenchOp` for what an entry says.

FLOPs are 2 per multiply-add of the matrix products, which is all that grows; softmax, norms and sorting are left out.
The backward pass of an attention is twice its forward (gradients of weights and values, then of queries and keys);
recomputing the scores, as kernels do to save memory, is their choice and not part of the floor. Grouping has no
gradient.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from coterie.bench.registry import BenchOp, Case, Contender, Inputs, Option, register_op
from coterie.ops import Explanation, dynamic_group_attention, dynamic_groups, explain, grouped_attention, operations

BASELINE = "scaled_dot_product_attention"


def exact_flops(case: Case, backward: bool) -> int:
    """Exact attention: the products query·key and weights·value over all pairs."""
    forward = 4 * case.batch * case.heads * case.tokens**2 * case.head_dim
    return 3 * forward if backward else forward


def dynamic_group_flops(case: Case, backward: bool) -> int:
    """Attention of every query over top_k keys, and the products of centroids with queries and with keys; exact
    attention where every key is chosen."""
    groups, top_k = int(case.options["groups"]), int(case.options["top_k"])
    if top_k >= case.tokens:
        return exact_flops(case, backward)
    per_width = case.batch * case.heads * case.tokens * case.head_dim
    attention, grouping = 4 * per_width * top_k, 4 * per_width * groups
    return (3 * attention if backward else attention) + grouping


def _normal(case: Case, *shape: int, stream: int) -> Tensor:
    """Standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(case.seed * 1000 + stream)
    return torch.randn(*shape, generator=generator).to(device=case.torch_device, dtype=case.torch_dtype)


def _query_key_value(case: Case) -> Inputs:
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    return {name: _normal(case, *shape, stream=i) for i, name in enumerate(("query", "key", "value"))}


def exact_attention_rows(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    rows: Int[Tensor, " rows"],
) -> Float[Tensor, "batch heads rows head_dim"]:
    """Exact attention of some queries, in plain torch."""
    scores = query[:, :, rows] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value


def _exact_oracle(case: Case, inputs: Inputs, rows: Tensor) -> Tensor:
    return exact_attention_rows(inputs["query"], inputs["key"], inputs["value"], rows)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


EXACT = Contender(BASELINE, _sdpa, "exact attention", exact_flops, growth=2)

# ---- exact attention by each of torch's own backends
# ------------------------------------------------------------------------

_TORCH_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def _sdpa_by(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(query, key, value)


def _dense_memory(case: Case) -> int:
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
        memory = _dense_memory if name == "math" else None
        found[name] = Contender(
            name, partial(_sdpa_by, backend), "exact attention", exact_flops, growth=2, memory=memory
        )
    return found


register_op(
    BenchOp(
        name="global",
        summary="exact attention over all tokens, by each of torch's backends",
        options={},
        make_inputs=_query_key_value,
        differentiable=("query", "key", "value"),
        baseline=EXACT,
        backends=_exact_backends,
        default_backends=("flash", "efficient", "cudnn"),
        oracles={"exact attention": _exact_oracle},
        auto=lambda case, backward: BASELINE,
    )
)

# ---- dynamic group attention
# --------------------------------------------------------------------------------------------------


def _dynamic_group_inputs(case: Case) -> Inputs:
    """Normal queries, keys and values, and unit centroids; `skew` adds a common direction to the queries, so that few
    groups get most of them."""
    inputs = _query_key_value(case)
    centroids = _normal(case, case.heads, int(case.options["groups"]), case.head_dim, stream=3)
    common = _normal(case, 1, case.heads, 1, case.head_dim, stream=4)
    inputs["query"] = inputs["query"] + case.options["skew"] * common
    inputs["centroids"] = torch.nn.functional.normalize(centroids.float(), dim=-1).to(centroids.dtype)
    return inputs


def _dynamic_group_run(
    backend: str, top_k: int, query: Tensor, key: Tensor, value: Tensor, centroids: Tensor
) -> Tensor:
    return dynamic_group_attention(query, key, value, centroids, top_k, backend=backend)


def _dynamic_group_oracle(case: Case, inputs: Inputs, rows: Tensor) -> Tensor:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    assignment, selected = dynamic_groups(query, key, inputs["centroids"], int(case.options["top_k"]))
    return grouped_attention(query[:, :, rows], key, value, assignment[:, :, rows], selected, backend="reference")


def _explain(case: Case, backward: bool) -> Explanation:
    """What each backend says to a call like the case's; only dtype, device and head_dim matter, so one token will
    do."""
    inputs = _dynamic_group_inputs(replace(case, tokens=1))
    query, key, value = (inputs[name].requires_grad_(backward) for name in ("query", "key", "value"))
    return explain(dynamic_group_attention, query, key, value, inputs["centroids"], 1)


def _dynamic_group_backends(case: Case, backward: bool) -> dict[str, Contender | str]:
    call = _explain(case, backward).call
    found: dict[str, Contender | str] = {}
    for backend in operations()["dynamic_group_attention"].backends:
        dense = backend.name == "reference"
        contender = Contender(
            backend.name,
            partial(_dynamic_group_run, backend.name, int(case.options["top_k"])),
            "dynamic group attention",
            dynamic_group_flops,
            growth=2 if dense else 1,
            memory=_dense_memory if dense else None,
        )
        found[backend.name] = backend.refusal(call) or contender
    return found


register_op(
    BenchOp(
        name="dynamic_group",
        summary="dynamic group attention: grouping, selection and attention together",
        options={
            "groups": Option(48, 1, "number of query groups"),
            "top_k": Option(98, 1, "keys that each group attends to"),
            "skew": Option(
                0.0, 0.0, "how much queries lean to one direction, which makes groups uneven (0 = not at all)"
            ),
        },
        make_inputs=_dynamic_group_inputs,
        differentiable=("query", "key", "value"),
        baseline=EXACT,
        backends=_dynamic_group_backends,
        default_backends=("native", "cpu", "triton"),
        oracles={"exact attention": _exact_oracle, "dynamic group attention": _dynamic_group_oracle},
        auto=lambda case, backward: _explain(case, backward).chosen,
        warm_up_tokens=lambda case: max(64, int(case.options["top_k"]) + 1),
    )
)
