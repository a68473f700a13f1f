"""Composable attention as torch sees it: compiled, exported, counted, under autocast; and what it says to bad input."""

import pytest
import torch
from composable_inputs import changed, inputs, results
from torch.nn import Module

from coterie import ops
from coterie.ops import HeadComposition, composable_attention
from coterie.ops.composable import cpu

FAST = ("native", "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Attention(Module):
    """The operation as torch.compile and torch.export want it; `maps` are the parts of pre, then of post."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value, *maps):
        pre, post = HeadComposition(*maps[:7]), HeadComposition(*maps[7:])
        return composable_attention(query, key, value, pre, post, is_causal=True, **self.options)


def flat(arguments):
    query, key, value, pre, post = arguments
    return query, key, value, *pre, *post


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("parts", [HeadComposition._fields, ("query_in", "query_out", "key_gate")], ids=["all", "some"])
def test_opcheck_of_the_registered_operators(backend, parts):
    query, key, value, pre, post = changed(inputs(parts=parts, dtype=torch.float32), lambda x: x)
    mask = torch.rand(2, 1, 1, 21) > 0.2
    arguments = [x.detach() for x in (query, key, value)]
    arguments += [[None if x is None else x.detach() for x in maps] for maps in (pre, post)]
    options = (True, 10, mask, 0.3, backend)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.coterie.composable_attention.default, (*arguments, *options), test_utils=checks)
    output, logsumexp = torch.ops.coterie.composable_attention(*arguments, *options)
    torch.library.opcheck(
        torch.ops.coterie.composable_attention_backward.default,
        (torch.randn_like(output), *arguments, logsumexp, *options),
        test_utils=checks,
    )


@pytest.mark.parametrize("backend", ["auto", *FAST])
def test_compiles_without_a_graph_break(backend):
    arguments = inputs(dtype=torch.float32, parts=("query_in", "query_out", "key_gate", "static"))
    attention = Attention(window=9, backend=backend)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 3, 21, 8)
    wanted = [x for x in flat(arguments) if x is not None]
    found = [torch.autograd.grad(call(*flat(arguments)), wanted, grad) for call in (attention, compiled)]
    torch.testing.assert_close(*found)


def test_compiles_once_for_all_lengths():
    torch.compiler.reset()
    compiled = torch.compile(Attention(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (17, 40, 133):
        arguments = inputs(queries=tokens, dtype=torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=tokens > 17):
            got = compiled(*flat(arguments))
        torch.testing.assert_close(got, Attention(backend="reference")(*flat(arguments)), rtol=1e-4, atol=1e-5)


def test_export_gives_a_program_of_torch_operators_for_any_length():
    arguments = tuple(x.detach() for x in flat(inputs(heads=4, kv_heads=2, dtype=torch.float32)))
    tokens = torch.export.Dim("tokens", min=2, max=512)
    places = [2] * 3 + ([1] * 6 + [None]) * 2
    shapes = {"query": {2: tokens}, "key": {2: tokens}, "value": {2: tokens}}
    shapes["maps"] = tuple({} if place is None else {place: tokens} for place in places[3:])
    program = torch.export.export(Attention(), arguments, dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names
    assert not any("coterie" in name for name in names)
    other = tuple(x.detach() for x in flat(inputs(heads=4, kv_heads=2, queries=50, dtype=torch.float32)))
    torch.testing.assert_close(program.module()(*other), Attention()(*other), rtol=1e-4, atol=1e-5)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = inputs(1, 2, 50, 40, 8, rank=2, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        output = composable_attention(*arguments, backend="cpu")
        forward = counter.get_total_flops()
        output.sum().backward()
    composing = 2 * 2 * (2 * 4 + 2 + 2)  # twice (pre, post), heads, of ranks in and out, gates, and static
    assert forward == 2 * 50 * 40 * (2 * (8 + 8) + composing)
    assert counter.get_total_flops() - forward == 2 * 50 * 40 * (2 * 5 * 8 + 3 * composing)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_autocast_lowers_query_key_and_value_and_keeps_the_maps(backend):
    query, key, value, pre, post = inputs(dtype=torch.float32)
    mixed = (query, key, value.detach().bfloat16().requires_grad_(), pre, post)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = composable_attention(*mixed, is_causal=True, backend=backend)
    assert got.dtype == torch.bfloat16
    low = (*(x.bfloat16() for x in (query, key, value)), pre, post)
    assert torch.equal(got, composable_attention(*low, is_causal=True, backend=backend))
    got.sum().backward()
    assert query.grad.dtype == pre.query_in.grad.dtype == torch.float32


# ---------------------------------------------------------------------------- choice of backend
def test_explain_gives_a_sentence_for_every_backend(monkeypatch):
    arguments = inputs(dtype=torch.float32)
    told = ops.explain(composable_attention, *arguments)
    assert told.chosen == "cpu"
    assert dict(told.reasons).keys() == {"triton", "cpu", "native", "reference"}
    assert all(reason for _, reason in told.reasons)
    assert told.call.needs_grad
    assert ops.explain("composable_attention", *(x.detach() for x in arguments[:3]), *arguments[3:]).call.needs_grad
    half = [x.detach().half() for x in arguments[:3]]
    assert ops.explain("composable_attention", *half, None, None).chosen == "native"
    assert "float16" in dict(ops.explain("composable_attention", *half, None, None).reasons)["cpu"]
    monkeypatch.setenv("COTERIE_BACKEND", "reference")
    assert ops.explain("composable_attention", *arguments).chosen == "reference"
    assert ops.explain("composable_attention", *arguments, backend="cpu").chosen == "cpu"
    assert cpu.SOURCE.exists()


@pytest.mark.parametrize("backend", FAST)
def test_one_token_and_one_head(backend):
    arguments = inputs(1, 1, 1, dim=1)
    got, want = (results(arguments, is_causal=True, window=1, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------------- wrong arguments
R = torch.randn
MASK = "attn_mask must broadcast to"


def bad(pre=None, **changes):
    query, key, value, maps, post = changed(inputs(2, 4, 6, 5, 8, kv_heads=2, dtype=torch.float32), lambda x: x)
    return {"query": query, "key": key, "value": value, "pre": maps._replace(**(pre or {})), "post": post} | changes


WRONG = {
    "query rank": ({"query": R(2, 6, 4)}, ValueError, "query must have shape"),
    "query type": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "query int": ({"query": torch.ones(2, 4, 6, 8).long()}, TypeError, "query must be float64"),
    "batch": ({"query": R(3, 4, 6, 8)}, ValueError, "query and key must agree in batch, got 3 and 2"),
    "head_dim": ({"query": R(2, 4, 6, 4)}, ValueError, "head_dim, got 4 and 8"),
    "heads": ({"query": R(2, 3, 6, 8)}, ValueError, "key and value must divide those of query, got 2 and 3"),
    "value": ({"value": R(2, 2, 6, 8)}, ValueError, "key and value must agree in"),
    "dtype": ({"key": R(2, 2, 5, 8).double()}, ValueError, "query and key must agree in dtype"),
    "device": ({"query": R(2, 4, 6, 8, device="meta")}, ValueError, "device, got meta and cpu"),
    "no tokens": ({"query": R(2, 4, 0, 8)}, ValueError, "query has no queries"),
    "no keys": ({"key": R(2, 2, 0, 8), "value": R(2, 2, 0, 8)}, ValueError, "key has no keys"),
    "maps": ({"post": (1, 2)}, TypeError, "post must be a HeadComposition or None, got tuple"),
    "map type": ({"pre": {"query_in": 3}}, TypeError, "pre.query_in must be a torch.Tensor, got int"),
    "map rank": (
        {"pre": {"query_gate": R(2, 6)}},
        ValueError,
        r"pre.query_gate must have shape \(batch, queries, heads",
    ),
    "map tokens": ({"pre": {"key_gate": R(2, 6, 4)}}, ValueError, r"= \(2, 5, 4\), got \(2, 6, 4\)"),
    "map heads": ({"pre": {"key_in": R(2, 5, 2, 2)}}, ValueError, r"pre.key_in must have shape .*got \(2, 5, 2, 2\)"),
    "map dtype": (
        {"pre": {"key_gate": R(2, 5, 4).half()}},
        ValueError,
        "key_gate must be torch.float32 or float32",
    ),
    "map alone": ({"pre": {"query_out": None}}, ValueError, "pre.query_in needs pre.query_out, got None"),
    "map alone 2": ({"pre": {"key_in": None}}, ValueError, "pre.key_out needs pre.key_in, got None"),
    "map ranks": (
        {"pre": {"key_in": R(2, 5, 3, 4)}},
        ValueError,
        "pre.key_out must agree in rank, got 3",
    ),
    "static": ({"pre": {"static": R(4, 3)}}, ValueError, r"pre.static must have shape \(heads, heads\) = \(4, 4\)"),
    "is_causal": ({"is_causal": 1}, TypeError, "is_causal must be a bool, got int"),
    "window 0": ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    "window float": ({"window": 2.0}, TypeError, "window must be an int, got float"),
    "mask dtype": ({"attn_mask": torch.ones(6, 5)}, TypeError, "attn_mask must be bool"),
    "mask shape": ({"attn_mask": torch.ones(6, 6, dtype=torch.bool)}, ValueError, MASK),
    "mask of heads": ({"attn_mask": torch.ones(2, 4, 6, 5, dtype=torch.bool)}, ValueError, "the same for all heads"),
    "mask type": ({"attn_mask": [True]}, TypeError, "attn_mask must be a torch.Tensor or None, got list"),
    "scale": ({"scale": -1.0}, ValueError, "scale must be positive"),
    "backend": ({"backend": "magic"}, ValueError, "unknown backend 'magic'; it takes 'auto', "),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message) as caught:
        composable_attention(**bad(**changes))
    assert str(caught.value).startswith("composable_attention: ")
    assert "\n" not in str(caught.value)
