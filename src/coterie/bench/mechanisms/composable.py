"""The entry `composable`: composable attention, causal, against exact causal attention on the same tensors.

Pairs outside of causality and window are not counted. A composition takes 2 · rank multiply-adds per head and pair for
the query's part, as many for the key's, and one for each gate: 10 with rank 2, before the softmax and again after it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from coterie.bench.mechanisms.exact import BASELINE, dense_memory, normal, query_key_value
from coterie.bench.registry import BenchOp, Case, Contender, Inputs, Option, register_op
from coterie.ops import Explanation, HeadComposition, composable_attention, explain, operations

_MAPS = [f"{use}_{part}" for use in ("pre", "post") for part in HeadComposition._fields]
_STRENGTH = 0.1


def _inputs(case: Case) -> Inputs:
    """Normal queries, keys and values, and the fourteen parts of both maps; without the static ones by default."""
    inputs = query_key_value(case)
    rank = int(case.options["rank"])
    ranked, gate = (case.batch, case.tokens, rank, case.heads), (case.batch, case.tokens, case.heads)
    shapes: tuple[tuple[int, ...], ...] = (ranked, ranked, gate, ranked, ranked, gate, (case.heads, case.heads))
    parts = dict(zip(HeadComposition._fields, shapes, strict=True))
    for stream, name in enumerate(_MAPS, start=3):
        part = name.split("_", 1)[1]
        if part != "static" or case.options["static"]:
            inputs[name] = _STRENGTH * normal(case, *parts[part], stream=stream)
    return inputs


def _maps(use: str, inputs: Inputs) -> HeadComposition:
    return HeadComposition(*(inputs.get(f"{use}_{part}") for part in HeadComposition._fields))


def _window(case: Case) -> int | None:
    return int(case.options["window"]) or None


def _run(backend: str, window: int | None, query: Tensor, key: Tensor, value: Tensor, **maps: Tensor) -> Tensor:
    pre, post = _maps("pre", maps), _maps("post", maps)
    return composable_attention(query, key, value, pre, post, is_causal=True, window=window, backend=backend)


def _seen(keys: int, rows: Tensor, window: int | None) -> Tensor:
    """(rows, keys): what the queries at `rows` may attend to."""
    behind = rows[:, None] - torch.arange(keys, device=rows.device)
    return (behind >= 0) & (behind < (window or keys))


def _oracle(case: Case, inputs: Inputs, rows: Tensor) -> Tensor:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    chosen = {name: x[:, rows] if "_query_" in name else x for name, x in inputs.items() if name in _MAPS}
    mask = _seen(key.shape[2], rows, _window(case))
    maps = _maps("pre", chosen), _maps("post", chosen)
    return composable_attention(query[:, :, rows], key, value, *maps, attn_mask=mask, backend="reference")


def _causal_oracle(case: Case, inputs: Inputs, rows: Tensor) -> Tensor:
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    scores = query[:, :, rows] @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~_seen(key.shape[2], rows, None), float("-inf")).softmax(-1) @ value


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees."""
    near = min(tokens, window or tokens)
    return near * (near + 1) // 2 + (tokens - near) * near


def causal_flops(case: Case, backward: bool) -> int:
    """Exact causal attention: the products query·key and weights·value over the pairs that count."""
    forward = 4 * case.batch * case.heads * _pairs(case.tokens, None) * case.head_dim
    return 3 * forward if backward else forward


def composable_flops(case: Case, backward: bool) -> int:
    """The products over the pairs that count, and both compositions; three times that with the backward pass."""
    composing = 4 * int(case.options["rank"]) + 2 + (case.heads if case.options["static"] else 0)
    pairs = case.batch * case.heads * _pairs(case.tokens, _window(case))
    forward = 2 * pairs * (2 * case.head_dim + 2 * composing)
    return 3 * forward if backward else forward


def _causal(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True)


def _explain(case: Case, backward: bool) -> Explanation:
    """What each backend says to a call like the case's; the number of tokens does not matter."""
    inputs = {name: x.requires_grad_(backward) for name, x in _inputs(replace(case, tokens=1)).items()}
    query, key, value = (inputs.pop(name) for name in ("query", "key", "value"))
    return explain(composable_attention, query, key, value, _maps("pre", inputs), _maps("post", inputs))


def _memory(case: Case) -> int:
    """Composition in plain torch holds some six tensors of all scores at once."""
    return 3 * dense_memory(case)


def _backends(case: Case, backward: bool) -> dict[str, Contender | str]:
    call, window = _explain(case, backward).call, _window(case)
    found: dict[str, Contender | str] = {}
    for backend in operations()["composable_attention"].backends:
        dense = backend.name == "reference"
        contender = Contender(
            backend.name,
            partial(_run, backend.name, window),
            "composable attention",
            composable_flops,
            growth=1 if window and not dense else 2,
            memory=_memory if dense else None,
        )
        found[backend.name] = backend.refusal(call) or contender
    return found


register_op(
    BenchOp(
        name="composable",
        summary="composable attention, causal: scores and weights mixed across heads",
        options={
            "rank": Option(2, 1, "rank of the maps, of query and key each"),
            "window": Option(0, 0, "keys that a query sees, itself counted (0 = all before it)"),
            "static": Option(0, 0, "1 adds the map that is the same for all pairs"),
        },
        make_inputs=_inputs,
        differentiable=("query", "key", "value", *_MAPS),
        baseline=Contender(
            BASELINE, _causal, "exact causal attention", causal_flops, growth=2, reads=("query", "key", "value")
        ),
        backends=_backends,
        default_backends=("native", "cpu", "triton"),
        oracles={"exact causal attention": _causal_oracle, "composable attention": _oracle},
        auto=lambda case, backward: _explain(case, backward).chosen,
    )
)
