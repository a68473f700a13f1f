"""Composable attention on a CUDA device: accuracy, gradients, compilation, determinism, memory.

Run by `pytest -m gpu tests/gpu`; everything is skipped where no CUDA device is.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from composable_inputs import PARTS, changed, inputs, leaves, results

from coterie.ops import HeadComposition, composable_attention, explain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DYNAMIC = PARTS[:-1]


def make(dtype=torch.bfloat16, batch=2, heads=16, queries=300, dim=64, strength=0.1, **sizes):
    torch.manual_seed(0)
    arguments = inputs(batch, heads, queries, dim=dim, dtype=torch.float32, strength=strength, **sizes)
    query, key, value, *maps = changed(arguments, lambda x: x.cuda())
    query, key, value = (x.detach().to(dtype).requires_grad_() for x in (query, key, value))
    return query, key, value, *maps


def check_against_exact(arguments, **options):
    """Error to the float64 definition at most twice that of the torch operators in the same dtype, in each result."""
    exact = results(changed(arguments, torch.Tensor.double), **options, backend="reference")
    plain, ours = (results(arguments, **options, backend=backend) for backend in ("native", "triton"))
    roundings = 4 if arguments[0].dtype != torch.float32 else 1  # weights and slopes are lowered for the tensor cores
    for i, (truth, other, result) in enumerate(zip(exact, plain, ours, strict=True)):
        assert torch.isfinite(result).all(), i
        floor = roundings * torch.finfo(arguments[0].dtype).eps * truth.norm()
        error, allowed = (result.double() - truth).norm(), 2 * (other.double() - truth).norm()
        assert error <= allowed + floor, f"{i}: error {error}, torch {allowed / 2}, of {truth.norm()}"


def test_auto_is_triton():
    assert explain(composable_attention, *make(queries=20)).chosen == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(8, 64), (16, 64), (32, 64), (16, 128), (32, 128), (12, 80)])
def test_accuracy(dtype, heads, dim):
    check_against_exact(make(dtype, heads=heads, dim=dim, parts=DYNAMIC), is_causal=True)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"queries": 77, "keys": 301, "dim": 20, "value_dim": 52}, {"is_causal": True}),
        ({"heads": 8, "kv_heads": 2, "rank": 1, "key_rank": 3}, {"is_causal": True, "window": 100}),
        ({"batch": 1, "heads": 1, "queries": 1}, {"is_causal": True, "window": 1}),
        ({"heads": 4, "dim": 256}, {"window": 50}),
        ({"heads": 64, "queries": 100, "parts": DYNAMIC}, {"is_causal": True}),
    ],
    ids=["odd dims, cross", "shared keys, ranks, window", "one", "wide, two-sided window", "64 heads"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes(dtype, shape, options):
    check_against_exact(make(dtype, **shape), **options)


def test_masks_and_a_batch_row_without_keys():
    arguments = make()
    mask = torch.rand(2, 1, 300, 300, device="cuda") > 0.4
    mask[1] = False
    check_against_exact(arguments, attn_mask=mask)
    assert not composable_attention(*arguments, attn_mask=mask)[1].any()


def test_same_bits_every_time():
    arguments = make(queries=1000)
    first = results(arguments, is_causal=True)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, results(arguments, is_causal=True), strict=True))


def test_compiles_without_a_break():
    arguments = make(parts=DYNAMIC)

    def attend(query, key, value, *maps):
        pre, post = HeadComposition(*maps[:7]), HeadComposition(*maps[7:])
        return composable_attention(query * 1.5, key, value, pre, post, is_causal=True) + 1

    flat = (*arguments[:3], *arguments[3], *arguments[4])
    found = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        found.append(torch.autograd.grad(function(*flat).float().square().sum(), leaves(*arguments)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=3e-2, atol=3e-2 * float(eager.abs().max()))


def test_memory_is_linear():
    """At 16,384 tokens of 16 heads all scores would take 17 GB."""
    arguments = make(batch=1, queries=16384, parts=DYNAMIC)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results(arguments, is_causal=True)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 1e9, f"{extra / 1e6:.0f} MB"
