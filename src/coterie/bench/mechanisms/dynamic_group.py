"""The entry `dynamic_group`. Grouping has no gradient, so that backward its share stays as it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from coterie.bench.mechanisms.exact import EXACT, dense_memory, exact_flops, exact_oracle, normal, query_key_value
from coterie.bench.registry import BenchOp, Case, Contender, Inputs, Option, register_op
from coterie.ops import Explanation, dynamic_group_attention, dynamic_groups, explain, grouped_attention, operations


def dynamic_group_flops(case: Case, backward: bool) -> int:
    """Attention of every query over top_k keys, and the products of centroids with queries and with keys; exact
    attention where every key is chosen."""
    groups, top_k = int(case.options["groups"]), int(case.options["top_k"])
    if top_k >= case.tokens:
        return exact_flops(case, backward)
    per_width = case.batch * case.heads * case.tokens * case.head_dim
    attention, grouping = 4 * per_width * top_k, 4 * per_width * groups
    return (3 * attention if backward else attention) + grouping


def _dynamic_group_inputs(case: Case) -> Inputs:
    """Normal queries, keys and values, and unit centroids; `skew` adds a common direction to the queries, so that few
    groups get most of them."""
    inputs = query_key_value(case)
    centroids = normal(case, case.heads, int(case.options["groups"]), case.head_dim, stream=3)
    common = normal(case, 1, case.heads, 1, case.head_dim, stream=4)
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
            memory=dense_memory if dense else None,
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
        oracles={"exact attention": exact_oracle, "dynamic group attention": _dynamic_group_oracle},
        auto=lambda case, backward: _explain(case, backward).chosen,
        warm_up_tokens=lambda case: max(64, int(case.options["top_k"]) + 1),
    )
)
