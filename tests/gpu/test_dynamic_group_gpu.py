"""Dynamic group attention on a CUDA device: accuracy, gradients, compilation, determinism, memory.

Run by `pytest -m gpu tests/gpu`; everything is skipped where no CUDA device is.
"""

import pytest
import torch
from torch import Tensor

from coterie.ops import dynamic_group_attention, dynamic_groups, explain, grouped_attention
from coterie.ops.dynamic_group import reference

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make(dtype=torch.bfloat16, batch=2, heads=4, queries=3136, keys=None, head_dim=64, value_dim=None):
    """Tokens in clumps, as those of an image are, so that group sizes vary widely; and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    keys, value_dim = keys or queries, value_dim or head_dim
    clumps = torch.randn(batch, heads, 12, head_dim, generator=generator)
    share = torch.rand(queries, generator=generator).square()
    query = torch.randn(batch, heads, queries, head_dim, generator=generator) + 1.5 * clumps[:, :, (12 * share).long()]
    key = torch.randn(batch, heads, keys, head_dim, generator=generator)
    value = torch.randn(batch, heads, keys, value_dim, generator=generator)
    grad = torch.randn(batch, heads, queries, value_dim, generator=generator)
    return [x.to(DEVICE, dtype) for x in (query, key, value, grad)]


def group(query, key, groups=48, top_k=98, key_mask=None):
    """Groups around random centroids."""
    generator = torch.Generator().manual_seed(1)
    centroids = torch.randn(query.shape[1], groups, query.shape[3], generator=generator).to(DEVICE)
    return dynamic_groups(query, key, centroids, top_k, key_mask=key_mask)


def run(backend, query, key, value, assignment, selected, grad, key_mask=None) -> tuple[Tensor, ...]:
    """Output and gradients of one backend; "exact" is the definition in float64."""
    wide = (lambda x: x.double()) if backend == "exact" else (lambda x: x)
    leaves = [wide(x.detach()).requires_grad_() for x in (query, key, value)]
    name = "reference" if backend == "exact" else backend
    output = grouped_attention(*leaves, assignment, selected, key_mask=key_mask, backend=name)
    return output.detach(), *torch.autograd.grad(output, leaves, wide(grad))


def check_against_exact(query, key, value, assignment, selected, grad, key_mask=None):
    """Error to the float64 definition at most twice that of the torch operators in the same dtype, in each result."""
    arguments = (query, key, value, assignment, selected, grad, key_mask)
    exact, torch_path, ours = (run(backend, *arguments) for backend in ("exact", "native", "triton"))
    for name, right, other, result in zip(("output", "query", "key", "value"), exact, torch_path, ours, strict=True):
        assert result.dtype == query.dtype
        assert torch.isfinite(result).all(), f"{name} holds NaN or infinity"
        error, allowed = (result.double() - right).abs(), (other.double() - right).abs()
        floor = 1e-6 * (1 + right.abs().mean())  # of float32 sums, where the exact result is 0 and torch finds it
        assert error.max() <= 2 * allowed.max() + floor, f"{name}: largest error {error.max()}, torch {allowed.max()}"
        assert error.mean() <= 2 * allowed.mean() + floor, f"{name}: mean error {error.mean()}, torch {allowed.mean()}"


def test_auto_is_triton():
    query, key, value, _ = make(queries=64)
    assert explain(grouped_attention, query, key, value).chosen == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_accuracy(dtype, head_dim):
    query, key, value, grad = make(dtype, head_dim=head_dim)
    check_against_exact(query, key, value, *group(query, key), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "top_k"),
    [
        ({"queries": 777, "keys": 501, "head_dim": 20, "value_dim": 52}, 7, 33),
        ({"queries": 300, "keys": 900, "head_dim": 256}, 5, 300),
        ({"batch": 1, "heads": 1, "queries": 1, "keys": 3}, 4, 1),
        ({"queries": 50, "keys": 5000, "head_dim": 8}, 100, 2),
        ({"batch": 1, "heads": 2, "queries": 9000}, 2, 600),
    ],
    ids=["odd dims", "wide heads", "one query", "more groups than queries", "long lists, large groups"],
)
def test_shapes(dtype, shape, groups, top_k):
    query, key, value, grad = make(dtype, **shape)
    check_against_exact(query, key, value, *group(query, key, groups, top_k), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_giant_group_and_empty_ones(dtype):
    query, key, value, grad = make(dtype)
    assignment, selected = group(query, key)
    assignment = torch.where(torch.arange(assignment.shape[-1], device=DEVICE) % 10 < 9, 7, assignment // 2 * 2)
    check_against_exact(query, key, value, assignment, selected, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_key_mask_and_a_batch_row_without_keys(dtype):
    query, key, value, grad = make(dtype, queries=1000)
    key_mask = torch.rand(2, 1000, device=DEVICE) < 0.4
    key_mask[1] = False
    assignment, selected = group(query, key)  # chosen without the mask, so that lists hold masked keys
    check_against_exact(query, key, value, assignment, selected, grad, key_mask)
    assert not run("triton", query, key, value, assignment, selected, grad, key_mask)[0][1].any()


def test_lists_padded_with_minus_one():
    query, key, value, grad = make(queries=1000)
    assignment, selected = group(query, key)
    padded = torch.cat([selected, torch.full_like(selected[..., :30], -1)], -1)
    shorter, longer = (run("triton", query, key, value, assignment, x, grad) for x in (selected, padded))
    for one, other in zip(shorter, longer, strict=True):
        torch.testing.assert_close(one, other)


def test_any_strides():
    query, key, value, grad = make(queries=1000)
    assignment, selected = group(query, key)
    plain = run("triton", query, key, value, assignment, selected, grad[..., :1].expand(grad.shape).contiguous())
    query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    strided = run("triton", query, key, value, assignment, selected, grad[..., :1].expand(grad.shape))
    for one, other in zip(plain, strided, strict=True):
        torch.testing.assert_close(one, other)


def test_same_bits_every_time():
    query, key, value, grad = make(queries=12544, batch=1)
    arguments = (query, key, value, *group(query, key), grad)
    first = run("triton", *arguments)
    for _ in range(3):
        assert all(torch.equal(one, other) for one, other in zip(first, run("triton", *arguments), strict=True))


def test_compiles_without_a_break():
    query, key, value, grad = make()
    centroids = torch.randn(4, 48, 64, device=DEVICE)

    def attend(query, key, value):
        return dynamic_group_attention(query * 1.5, key, value, centroids, 98) + 1

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = function(*leaves)
        results.append((output.detach(), *torch.autograd.grad(output, leaves, grad)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-2)


def test_opcheck():
    query, key, value, grad = make(torch.float32, queries=200)
    assignment, selected = group(query, key, 6, 9)
    arguments = (query, key, value, assignment, selected, None, 0.125)
    torch.library.opcheck(torch.ops.coterie.grouped_attention.default, (*arguments, "triton"))
    output, logsumexp = torch.ops.coterie.grouped_attention(*arguments, "triton")
    arguments = (grad, query, key, value, assignment, selected, None, output, logsumexp, 0.125)
    torch.library.opcheck(torch.ops.coterie.grouped_attention_backward.default, (*arguments, "triton"))


def test_host_does_not_wait():
    query, key, value, grad = make()
    arguments = (query, key, value, *group(query, key), grad)
    run("triton", *arguments)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run("triton", *arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_in_a_cuda_graph():
    query, key, value, grad = make()
    arguments = (query, key, value, *group(query, key), grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run("triton", *arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("triton", *arguments)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(expected, captured, strict=True))


def test_agrees_with_the_definition_of_the_whole_operation():
    query, key, value, _ = make(torch.float32, queries=500)
    centroids = torch.randn(4, 12, 64, device=DEVICE)
    output = dynamic_group_attention(query, key, value, centroids, 20, backend="triton")
    assignment, selected = reference.dynamic_groups(query.cpu(), key.cpu(), centroids.cpu(), 20, None, "cosine", False)
    exact = reference.grouped_attention(
        *(x.cpu().double() for x in (query, key, value)), assignment, selected, None, 64**-0.5
    )
    wrong = ((output.cpu().double() - exact).abs().amax(-1) > 1e-4).double().mean()
    assert wrong < 0.01, f"{wrong:.1%} of the rows differ; a few may, where two groups or keys are a rounding apart"


def test_memory_is_linear():
    """At 50,176 tokens the forward and the backward together take at most three times query, key, value and output."""
    query, key, value, grad = make(batch=1, heads=8, queries=50176)
    assignment, selected = group(query, key)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run("triton", query, key, value, assignment, selected, grad)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 3 * 4 * query.nbytes, f"{extra / query.nbytes:.1f} times the query"
