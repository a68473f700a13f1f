"""Dynamic group attention against brute force, and every backend against the reference in output and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from coterie import ops
from coterie.ops.dynamic_group import api, cpu, native, reference

FAST = ("native", "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tensors(batch=2, heads=2, queries=37, keys=29, dim=12, groups=5, dtype=torch.float64, value_dim=None):
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, requires_grad=True)
    key = torch.randn(batch, heads, keys, dim, dtype=dtype, requires_grad=True)
    value = torch.randn(batch, heads, keys, value_dim or dim, dtype=dtype, requires_grad=True)
    return query, key, value, torch.randn(heads, groups, dim)


def brute_force(query, key, value, centroids, top_k, mask=None):
    """The card's steps, one query at a time, in Python."""
    batch, heads, queries, dim = query.shape
    output = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            unit = centroids[h].to(query.dtype) / centroids[h].to(query.dtype).norm(dim=-1, keepdim=True)
            real = [j for j in range(key.shape[2]) if mask is None or mask[b, j]]
            for i in range(queries):
                q = query[b, h, i]
                group = max(range(len(unit)), key=lambda g: (float((q @ unit[g]).detach()), -g))
                chosen = sorted(real, key=lambda j: (-float((unit[group] @ key[b, h, j]).detach()), j))[:top_k]
                if not chosen:
                    continue
                scores = torch.stack([q @ key[b, h, j] for j in chosen]) / math.sqrt(dim)
                output[b, h, i] = scores.softmax(0) @ torch.stack([value[b, h, j] for j in chosen])
    return output


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_brute_force(backend, masked):
    query, key, value, centroids = tensors(queries=9, keys=13, groups=4)
    mask = torch.rand(2, 13) > 0.4 if masked else None
    got = ops.dynamic_group_attention(query, key, value, centroids, 5, key_mask=mask, backend=backend)
    torch.testing.assert_close(got, brute_force(query, key, value, centroids, 5, mask), rtol=1e-10, atol=1e-12)


def gradients(output, *inputs):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return (output, *torch.autograd.grad((output * weights).sum(), inputs))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 3, 90, 90, 20, 20, 9))),
    top_k=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    masked=st.booleans(),
    contiguous=st.booleans(),
)
def test_every_backend_equals_the_reference_in_output_and_gradients(sizes, top_k, seed, masked, contiguous):
    torch.manual_seed(seed)
    batch, heads, queries, keys, dim, value_dim, groups = sizes
    query, key, value, centroids = tensors(batch, heads, queries, keys, dim, groups, value_dim=value_dim)
    if not contiguous:
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
        value = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    mask = torch.rand(batch, keys) > 0.5 if masked else None
    assignment, selected = ops.dynamic_groups(query, key, centroids, min(top_k, keys), key_mask=mask)
    arguments = (query, key, value, assignment, selected)
    want = gradients(ops.grouped_attention(*arguments, key_mask=mask, backend="reference"), query, key, value)
    for backend in FAST:
        got = gradients(ops.grouped_attention(*arguments, key_mask=mask, backend=backend), query, key, value)
        for name, x, y in zip(("output", "query", "key", "value"), got, want):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10, msg=lambda m, n=name, b=backend: f"{b}, {n}: {m}")


@pytest.mark.parametrize(
    ("queries", "keys", "groups", "top_k"),
    [(2500, 3000, 3, 130), (700, 9000, 2, 300), (1, 1, 1, 1), (64, 64, 48, 16), (196, 196, 48, 98), (5, 400, 48, 399)],
)
def test_large_groups_many_keys_and_few_tokens(queries, keys, groups, top_k):
    query, key, value, centroids = tensors(1, 2, queries, keys, 8, groups)
    assignment, selected = ops.dynamic_groups(query, key, centroids, top_k)
    want = gradients(
        ops.grouped_attention(query, key, value, assignment, selected, backend="reference"), query, key, value
    )
    for backend in FAST:
        got = gradients(
            ops.grouped_attention(query, key, value, assignment, selected, backend=backend), query, key, value
        )
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("tokens", [61, 700])
def test_error_is_within_twice_that_of_plain_torch(dtype, backend, tokens):
    query, key, value, centroids = tensors(2, 2, tokens, tokens, 32, 6)
    rounded = [x.detach().to(dtype).double().requires_grad_() for x in (query, key, value)]
    assignment, selected = ops.dynamic_groups(rounded[0], rounded[1], centroids, 20)
    exact = gradients(ops.grouped_attention(*rounded, assignment, selected, backend="reference"), *rounded)
    low = [x.detach().to(dtype).requires_grad_() for x in rounded]
    plain = gradients(ops.grouped_attention(*low, assignment, selected, backend="reference"), *low)
    fast = gradients(ops.grouped_attention(*low, assignment, selected, backend=backend), *low)
    for truth, theirs, ours in zip(exact, plain, fast):
        budget = 2 * (theirs.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= budget


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 300), st.integers(1, 20)),
    groups=st.integers(1, 20),
    top_k=st.integers(1, 60),
    seed=st.integers(0, 2**16),
    metric=st.sampled_from(api.METRICS),
    masked=st.booleans(),
    normalize=st.booleans(),
)
def test_grouping_breaks_ties_towards_the_lower_index(sizes, groups, top_k, seed, metric, masked, normalize):
    """Small integers make the products exact, and ties frequent: every implementation has to give the same indices."""
    torch.manual_seed(seed)
    batch, heads, queries, keys, dim = sizes
    query = torch.randint(-2, 3, (batch, heads, queries, dim)).float()
    key = torch.randint(-1, 2, (batch, heads, keys, dim)).float()
    # one coordinate each: unit length without rounding, so that ties are exact
    centroids = torch.zeros(heads, groups, dim)
    centroids.scatter_(-1, torch.randint(dim, (heads, groups, 1)), torch.randint(1, 3, (heads, groups, 1)).float())
    mask = torch.rand(batch, keys) > 0.5 if masked else None
    normalize = normalize and dim == 1
    want = reference.dynamic_groups(query, key, centroids, top_k, mask, metric, normalize)
    got = ops.dynamic_groups(query, key, centroids, top_k, key_mask=mask, metric=metric, normalize_keys=normalize)
    direction = reference.normalised(centroids)
    bias = centroids.square().sum(-1) / -2 if metric == "l2" else centroids.new_zeros(heads, groups)
    plain = native.dynamic_groups(
        query, key, direction if metric == "cosine" else centroids, bias, direction, min(top_k, keys), mask, normalize
    )
    for other in (got, plain):
        assert torch.equal(other[0], want[0])
        assert torch.equal(other[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouping_chooses_the_best_of_many_keys(dtype):
    query, key, _, centroids = tensors(1, 2, 5000, 20000, 16, 7, dtype=torch.float32)
    query, key = query.detach().to(dtype), key.detach().to(dtype)
    assignment, selected = ops.dynamic_groups(query, key, centroids, 150)
    unit = reference.normalised(centroids)
    closeness = torch.einsum("bhid,hgd->bhig", query.float(), unit)
    assert (closeness.amax(-1) - closeness.gather(-1, assignment[..., None])[..., 0]).max() < 1e-4
    relevance = torch.einsum("hgd,bhid->bhgi", unit, key.float())
    worst_chosen = relevance.gather(-1, selected).amin(-1)
    assert (relevance.topk(150, dim=-1).values[..., -1] - worst_chosen).max() < 1e-4
    assert (selected.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_top_k_of_all_keys_is_scaled_dot_product_attention(backend):
    query, key, value, centroids = tensors()
    got = ops.dynamic_group_attention(query, key, value, centroids, 29, backend=backend)
    torch.testing.assert_close(got, scaled_dot_product_attention(query, key, value), rtol=1e-12, atol=1e-13)
    everything = torch.arange(29).expand(2, 2, 5, 29)
    assignment = torch.randint(5, (2, 2, 37))
    grouped = ops.grouped_attention(query, key, value, assignment, everything, backend=backend)
    torch.testing.assert_close(grouped, got, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_masked_keys_are_never_read(backend):
    query, key, value, centroids = tensors()
    mask = torch.rand(2, 29) > 0.5
    mask[1] = False
    poisoned = [torch.where(mask[:, None, :, None], x, torch.full_like(x, 1e9)) for x in (key, value)]
    got = gradients(
        ops.dynamic_group_attention(query, *poisoned, centroids, 20, key_mask=mask, backend=backend), query, key, value
    )
    clean = ops.dynamic_group_attention(query, key, value, centroids, 20, key_mask=mask, backend=backend)
    torch.testing.assert_close(got[0], clean)
    assert torch.equal(got[0][1], torch.zeros_like(got[0][1]))
    assert all(torch.isfinite(x).all() for x in got)
    assert not got[2][~mask[:, None].expand(2, 2, 29)].any()


@pytest.mark.parametrize("backend", FAST)
def test_tokens_may_be_permuted(backend):
    query, key, value, centroids = tensors(keys=37)
    order = torch.randperm(37)
    plain = ops.dynamic_group_attention(query, key, value, centroids, 9, backend=backend)
    moved = ops.dynamic_group_attention(
        query[:, :, order], key[:, :, order], value[:, :, order], centroids, 9, backend=backend
    )
    torch.testing.assert_close(moved, plain[:, :, order], rtol=1e-9, atol=1e-10)


def test_result_does_not_depend_on_threads_or_batch():
    query, key, value, centroids = tensors(3, 2, 1500, 1500, 16, 4, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            output = ops.dynamic_group_attention(query, key, value, centroids, 30, backend="cpu")
            results.append(gradients(output, query, key, value))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))
    alone = ops.dynamic_group_attention(query[1:2], key[1:2], value[1:2], centroids, 30, backend="cpu")
    assert torch.equal(alone[0], results[0][0][1])


def test_gradcheck_of_the_registered_operator():
    query, key, value, centroids = tensors(1, 1, 7, 6, 3, 2)
    assignment, selected = ops.dynamic_groups(query, key, centroids, 3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.grouped_attention(q, k, v, assignment, selected, backend="cpu"), (query, key, value)
    )


def test_opcheck_of_the_registered_operators():
    query, key, value, centroids = (x.detach() for x in tensors(dtype=torch.float32))
    mask = torch.ones(2, 29, dtype=torch.bool)
    direction = reference.normalised(centroids)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.coterie.dynamic_groups,
        (query, key, direction, torch.zeros(2, 5), direction, 7, mask, False, "cpu"),
        test_utils=checks,
    )
    assignment, selected = ops.dynamic_groups(query, key, centroids, 7)
    inputs = (query, key, value, assignment, selected, mask)
    torch.library.opcheck(torch.ops.coterie.grouped_attention, (*inputs, 0.3, "cpu"), test_utils=checks)
    output, logsumexp = torch.ops.coterie.grouped_attention(*inputs, 0.3, "cpu")
    torch.library.opcheck(
        torch.ops.coterie.grouped_attention_backward,
        (torch.randn_like(output), *inputs, output, logsumexp, 0.3, "cpu"),
        test_utils=checks,
    )


@pytest.mark.parametrize("backend", ["auto", *FAST])
def test_compiles_without_a_graph_break(backend):
    query, key, value, centroids = tensors(dtype=torch.float32)
    torch.compiler.reset()

    def call(q, k, v):
        return ops.dynamic_group_attention(q, k, v, centroids, 7, backend=backend)

    got = gradients(torch.compile(call, fullgraph=True, backend="aot_eager")(query, key, value), query, key, value)
    for x, y in zip(got, gradients(call(query, key, value), query, key, value)):
        torch.testing.assert_close(x, y)


def test_export_gives_a_program_of_torch_operators_only():
    query, key, value, centroids = (x.detach() for x in tensors(dtype=torch.float32))

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return ops.dynamic_group_attention(q, k, v, centroids, 7)

    program = torch.export.export(Module(), (query, key, value))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names
    assert not any("coterie" in name for name in names)
    torch.testing.assert_close(program.module()(query, key, value), Module()(query, key, value))


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value, centroids = tensors(1, 2, 50, 40, 8, 4, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        output = ops.dynamic_group_attention(query, key, value, centroids, 5, backend="cpu")
        forward = counter.get_total_flops()
        output.sum().backward()
    assert forward == 2 * 2 * (50 + 40) * 4 * 8 + 2 * 2 * 50 * 5 * (8 + 8)
    assert counter.get_total_flops() - forward == 2 * 2 * 50 * 5 * 5 * 8


def test_empty_groups_and_one_group():
    query, key, value, _ = tensors(1, 1, 30, 30, 4)
    far = torch.tensor([[[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0]]])
    query = (query.detach().abs() * torch.tensor([1.0, 0, 0, 0])).requires_grad_()
    for backend in FAST:
        assignment, _ = ops.dynamic_groups(query, key, far, 4)
        assert (assignment == 0).all()
        got = gradients(ops.dynamic_group_attention(query, key, value, far, 4, backend=backend), query, key, value)
        assert all(torch.isfinite(x).all() for x in got)


def bad(**changes):
    query, key, value, centroids = (x.detach() for x in tensors(2, 2, 6, 5, 4, 3, dtype=torch.float32))
    return {"query": query, "key": key, "value": value, "centroids": centroids, "top_k": 2} | changes


NAN = torch.full((2, 3, 4), float("nan"))
R = torch.randn
WRONG = {
    "query rank": ({"query": R(2, 6, 4)}, ValueError, "query must have shape"),
    "query type": ({"query": [1.0]}, TypeError, "query must be a torch.Tensor, got list"),
    "query int": ({"query": torch.ones(2, 2, 6, 4, dtype=torch.long)}, TypeError, "query must be float64"),
    "batch": ({"query": R(3, 2, 6, 4)}, ValueError, "query and key must agree in batch, got 3 and 2"),
    "batch of one does not broadcast": ({"query": R(1, 2, 6, 4)}, ValueError, "batch, got 1 and 2"),
    "heads": ({"key": R(2, 1, 5, 4), "value": R(2, 1, 5, 4)}, ValueError, "heads, got 2 and 1"),
    "head_dim": ({"query": R(2, 2, 6, 8)}, ValueError, "head_dim, got 8 and 4"),
    "value": ({"value": R(2, 2, 6, 4)}, ValueError, "key and value must agree in"),
    "dtype": ({"query": R(2, 2, 6, 4).double()}, ValueError, "dtype, got torch.float64 and torch.float32"),
    "device": ({"query": R(2, 2, 6, 4, device="meta")}, ValueError, "device, got meta and cpu"),
    "no tokens": ({"query": R(2, 2, 0, 4)}, ValueError, "query has no queries"),
    "no keys": ({"key": R(2, 2, 0, 4), "value": R(2, 2, 0, 4)}, ValueError, "key has no keys"),
    "no batch": ({"query": R(0, 2, 6, 4)}, ValueError, "query has no batch"),
    "top_k 0": ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "top_k float": ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
    "top_k bool": ({"top_k": True}, TypeError, "top_k must be an int, got bool"),
    "centroid heads": ({"centroids": R(3, 3, 4)}, ValueError, "query and centroids must agree in heads, got 2 and 3"),
    "centroid dim": ({"centroids": R(2, 3, 5)}, ValueError, "head_dim, got 4 and 5"),
    "centroid rank": ({"centroids": R(3, 4)}, ValueError, "centroids must have shape"),
    "no groups": ({"centroids": R(2, 0, 4)}, ValueError, "centroids has no groups"),
    "NaN": ({"centroids": NAN}, ValueError, r"centroids holds NaN or infinity, first at index \(0, 0, 0\)"),
    "metric": ({"metric": "manhattan"}, ValueError, "metric must be one of 'cosine', 'l2', 'dot', got 'manhattan'"),
    "scale": ({"scale": -1.0}, ValueError, "scale must be positive"),
    "scale type": ({"scale": "big"}, TypeError, "scale must be a number"),
    "mask dtype": ({"key_mask": torch.ones(2, 5)}, TypeError, "key_mask must be bool"),
    "mask shape": (
        {"key_mask": torch.ones(1, 5, dtype=torch.bool)},
        ValueError,
        r"key_mask must have shape .*\(2, 5\)",
    ),
    "backend": ({"backend": "magic"}, ValueError, "unknown backend 'magic'; it takes 'auto', 'triton', 'cpu'"),
    "backend type": ({"backend": 3}, TypeError, "backend must be a str"),
    "backend absent": ({"backend": "triton"}, ops.BackendUnavailable, "cannot serve this call: it takes CUDA tensors"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        ops.dynamic_group_attention(**bad(**changes))


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize(("name", "value"), [("assignment", 3), ("assignment", -1), ("selected", 5), ("selected", -2)])
@pytest.mark.parametrize("tokens", [1, 60])
def test_groups_out_of_range_are_refused(backend, name, value, tokens):
    query, key, value_, _ = (x.detach() for x in tensors(1, 1, 6 * tokens, 5, 4, 3))
    index = {"assignment": torch.zeros(1, 1, 6 * tokens, dtype=torch.long), "selected": torch.zeros(1, 1, 3, 1).long()}
    index[name].flatten()[-1] = value
    with pytest.raises(ValueError, match=f"{name} must lie in"):
        ops.grouped_attention(query, key, value_, **index, backend=backend)


def test_environment_overrides_auto_and_explicit_wins(monkeypatch):
    inputs = [x.detach() for x in tensors(dtype=torch.float32)][:3]
    assert ops.explain("grouped_attention", *inputs).chosen == "cpu"
    monkeypatch.setenv("COTERIE_BACKEND", "native")
    assert ops.explain(ops.grouped_attention, *inputs).chosen == "native"
    assert ops.explain("grouped_attention", *inputs, backend="reference").chosen == "reference"
    monkeypatch.setenv("COTERIE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown COTERIE_BACKEND 'nonsense'"):
        ops.explain("grouped_attention", *inputs)


def test_explain_gives_a_sentence_for_every_backend():
    told = ops.explain(ops.dynamic_group_attention, *(x.detach() for x in tensors()))
    assert dict(told.reasons).keys() == {"triton", "cpu", "native", "reference"}
    assert all(reason for _, reason in told.reasons)
    assert "-> cpu" in str(told)
    with pytest.raises(ValueError, match="unknown operation 'nothing'; known are"):
        ops.explain("nothing")


def test_without_a_compiler_torch_operators_serve_after_one_warning(tmp_path):
    """In a fresh process, as the answer is kept for the life of a process."""
    import subprocess
    import sys

    code = (
        "import warnings, torch, coterie\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    q = torch.randn(1, 2, 20, 8)\n"
        "    for _ in range(3): coterie.dynamic_group_attention(q, q, q, torch.randn(2, 3, 8), 4)\n"
        "print(len([w for w in seen if 'no C++ compiler' in str(w.message)]))\n"
        "print(coterie.explain('grouped_attention', q, q, q).chosen)\n"
    )
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path), "COTERIE_CXX": "no-such-compiler"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["1", "native"]


def test_cpu_refuses_what_it_cannot_do():
    half = [x.detach().half() for x in tensors()][:3]
    told = ops.explain("grouped_attention", *half)
    assert told.chosen == "native"
    assert "float16" in dict(told.reasons)["cpu"]
    assert cpu.SOURCE.exists()
