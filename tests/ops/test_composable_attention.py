"""Composable attention against brute force, and every backend against the reference in output and every gradient."""

import math
from functools import partial

import pytest
import torch
from composable_inputs import PARTS, changed, inputs, leaves, results
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from coterie.ops import HeadComposition, composable_attention
from coterie.ops.composable import native

FAST = ("native", "cpu")
EVERY = ("reference", *FAST)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def brute_force(query, key, value, pre, post, allowed, scale):
    """The equation of `HeadComposition`, one pair of query and key at a time, in Python."""

    def compose(a, maps, b, t, s):
        out = []
        for m in range(len(a)):
            y = a[m]
            y = y + sum(a[n] * maps.static[n, m] for n in range(len(a)))
            for r in range(maps.query_in.shape[2]):
                y = y + sum(a[n] * maps.query_in[b, t, r, n] for n in range(len(a))) * maps.query_out[b, t, r, m]
            for r in range(maps.key_in.shape[2]):
                y = y + sum(a[n] * maps.key_in[b, s, r, n] for n in range(len(a))) * maps.key_out[b, s, r, m]
            out.append(y + a[m] * maps.query_gate[b, t, m] + a[m] * maps.key_gate[b, s, m])
        return out

    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros(batch, heads, queries, value.shape[3], dtype=query.dtype)
    for b in range(batch):
        for t in range(queries):
            seen = [s for s in range(key.shape[2]) if allowed[b, t, s]]
            if not seen:
                continue
            raw = [[scale * query[b, n, t] @ key[b, n // group, s] for n in range(heads)] for s in seen]
            scores = torch.stack([torch.stack(compose(x, pre, b, t, s)) for x, s in zip(raw, seen)])
            weights = scores.softmax(0)
            for s, w in zip(seen, weights):
                for m, y in enumerate(compose(list(w), post, b, t, s)):
                    output[b, m, t] += y * value[b, m // group, s]
    return output


@pytest.mark.parametrize("backend", EVERY)
def test_equals_brute_force(backend):
    arguments = inputs(2, 4, 5, 7, 6, 3, kv_heads=2, key_rank=3)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    allowed = [[[s <= t + 2 and s > t + 2 - 4 for s in range(7)] for t in range(5)]] * 2
    want = brute_force(*changed(arguments, lambda x: x), torch.tensor(allowed) & mask[:, 0], 0.3)
    got = composable_attention(*arguments, is_causal=True, window=4, attn_mask=mask, scale=0.3, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


drawn_sizes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 150), st.integers(1, 150))


@settings(max_examples=70, deadline=None)
@given(
    sizes=drawn_sizes,
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    shared=st.sampled_from([1, 2, 3]),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    parts=st.lists(st.sampled_from(["query", "query_gate", "key", "key_gate", "static"]), unique=True),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 160),
    mask=st.sampled_from([None, "keys", "pairs", "square"]),
    contiguous=st.booleans(),
    seed=st.integers(0, 2**16),
    chunk=st.sampled_from([1, 3000]),
)
def test_every_backend_equals_the_reference_in_output_and_gradients(
    sizes, dims, shared, ranks, parts, is_causal, window, mask, contiguous, seed, chunk
):
    torch.manual_seed(seed)
    batch, kv_heads, queries, keys = sizes
    parts = {name for name in PARTS if name in parts or name.rsplit("_", 1)[0] in parts}
    arguments = inputs(
        batch, kv_heads * shared, queries, keys, *dims, kv_heads, rank=ranks[0], key_rank=ranks[1], parts=parts
    )
    if not contiguous:  # (batch, tokens, heads, dim) in memory, and a value whose last dimension is not the densest
        arguments = changed(arguments, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
        query, key, value, *maps = arguments
        query, key = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key))
        arguments = (query, key, value.detach().mT.contiguous().mT.requires_grad_(), *maps)
    shapes = {"keys": (batch, 1, 1, keys), "pairs": (batch, 1, queries, keys), "square": (queries, keys)}
    attn_mask = None if mask is None else torch.rand(shapes[mask]) > 0.6
    options = {"is_causal": is_causal, "window": window, "attn_mask": attn_mask}
    want = results(arguments, **options, backend="reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "CHUNK", chunk)
        for backend in FAST:
            got = results(arguments, **options, backend=backend)
            for i, (x, y) in enumerate(zip(got, want, strict=True)):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10, msg=lambda m, i=i, b=backend: f"{b}, {i}: {m}")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("heads", "queries", "keys"), [(2, 700, 700), (1, 3, 2000), (17, 130, 70)])
def test_many_blocks_many_tiles_and_many_heads(backend, heads, queries, keys):
    arguments = inputs(1, heads, queries, keys)
    for options in ({"is_causal": True}, {"is_causal": True, "window": 100}, {"window": 50}):
        want = results(arguments, **options, backend="reference")
        got = results(arguments, **options, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", FAST)
def test_error_is_within_twice_that_of_plain_torch(dtype, backend):
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("the C++ kernels take float32, float64 and bfloat16")
    low = changed(inputs(2, 4, 200, 200, 32), lambda x: x.to(dtype))
    exact = results(changed(low, torch.Tensor.double), is_causal=True, backend="reference")
    plain = results(low, is_causal=True, backend="reference")
    fast = results(low, is_causal=True, backend=backend)
    for truth, theirs, ours in zip(exact, plain, fast, strict=True):
        assert ours.dtype == dtype
        budget = 2 * (theirs.double() - truth).norm() + torch.finfo(dtype).eps / 4 * truth.norm()
        assert (ours.double() - truth).norm() <= budget


@pytest.mark.parametrize("backend", FAST)
def test_maps_may_be_float32_beside_a_bfloat16_query(backend):
    arguments = inputs(dtype=torch.bfloat16)
    assert arguments[3].query_in.dtype == torch.float32
    want, got = (results(arguments, is_causal=True, backend=b) for b in ("reference", backend))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


# ---------------------------------------------------------------------------- what the equation implies
@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("maps", ["None", "empty", "zero"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_without_maps_or_with_zero_maps_it_is_scaled_dot_product_attention(backend, maps, is_causal):
    query, key, value, pre, _ = inputs(queries=90)
    pre = {"None": None, "empty": HeadComposition(), "zero": HeadComposition(*(0 * x for x in pre))}[maps]
    got = composable_attention(query, key, value, pre, pre, is_causal=is_causal, backend=backend)
    torch.testing.assert_close(
        got, scaled_dot_product_attention(query, key, value, is_causal=is_causal), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("backend", EVERY)
def test_static_maps_alone_are_talking_heads_with_a_residual(backend):
    query, key, value, pre, post = inputs(parts={"static"})
    eye = torch.eye(3, dtype=torch.float64)
    scores = torch.einsum("bnts,nm->bmts", query @ key.mT / math.sqrt(8), eye + pre.static)
    weights = torch.einsum("bnts,nm->bmts", scores.softmax(-1), eye + post.static)
    got = composable_attention(query, key, value, pre, post, backend=backend)
    torch.testing.assert_close(got, weights @ value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", EVERY)
def test_heads_may_be_permuted(backend):
    query, key, value, pre, post = inputs(heads=5)
    order = torch.randperm(5)
    moved = [HeadComposition(*(x[..., order] for x in m[:6]), m.static[order][:, order]) for m in (pre, post)]
    got = composable_attention(query[:, order], key[:, order], value[:, order], *moved, backend=backend)
    torch.testing.assert_close(
        got, composable_attention(query, key, value, pre, post, backend=backend)[:, order], rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("backend", EVERY)
def test_grouped_heads_are_repeated_heads(backend):
    query, key, value, pre, post = inputs(heads=6, kv_heads=2)
    repeated = (query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), pre, post)
    got = composable_attention(query, key, value, pre, post, backend=backend)
    torch.testing.assert_close(got, composable_attention(*repeated, backend=backend), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("window", [None, 30])
def test_the_past_does_not_see_the_future(backend, window):
    arguments = inputs(1, 2, 150)

    def replace(x):  # tokens from 100 on are others
        x = x.clone()
        if 150 in x.shape:
            x.narrow(x.shape.index(150), 100, 50).normal_()
        return x

    run = partial(composable_attention, is_causal=True, window=window, backend=backend)
    before, after = run(*arguments), run(*changed(arguments, replace))
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100:], after[:, :, 100:])


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_counts_oneself(backend, is_causal):
    query, key, value, pre, post = inputs(1, 2, 80)
    value_grad = torch.autograd.grad(
        composable_attention(query, key, value, pre, post, is_causal=is_causal, window=8, backend=backend)[
            :, :, 40
        ].sum(),
        value,
    )[0]
    seen = value_grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    assert seen == list(range(33, 41 if is_causal else 48))


@pytest.mark.parametrize("backend", EVERY)
def test_fewer_queries_than_keys_stand_at_the_end(backend):
    query, key, value, pre, post = inputs(1, 2, 90)
    last = [HeadComposition(*(x[:, 70:] for x in m[:3]), *m[3:]) for m in (pre, post)]
    for window in (None, 25):
        full = composable_attention(query, key, value, pre, post, is_causal=True, window=window, backend=backend)
        part = composable_attention(query[:, :, 70:], key, value, *last, is_causal=True, window=window, backend=backend)
        torch.testing.assert_close(part, full[:, :, 70:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", EVERY)
def test_rows_without_keys_give_zeros_and_no_gradient(backend):
    arguments = inputs(2, 2, 70, 40)  # causal: the first 30 queries stand before the first key
    mask = torch.rand(2, 1, 1, 40) > 0.5
    mask[1] = False
    found = results(arguments, is_causal=True, attn_mask=mask, backend=backend)
    assert all(torch.isfinite(x).all() for x in found)
    output, query_grad = found[:2]
    assert not output[1].any()
    assert not output[:, :, :30].any()
    assert not query_grad[1].any()
    assert not found[2][~mask.expand(2, 2, 1, 40)[:, :, 0]].any()
    assert output[0, :, -1].any()


@pytest.mark.parametrize("backend", EVERY)
def test_padding_gives_what_the_sequence_alone_gives(backend):
    query, key, value, pre, post = inputs(1, 2, 100)
    mask = (torch.arange(100) >= 37)[None, None, None]
    padded = composable_attention(query, key, value, pre, post, is_causal=True, attn_mask=mask, backend=backend)
    cut = [HeadComposition(*(x[:, 37:] for x in m[:6]), m.static) for m in (pre, post)]
    alone = composable_attention(*(x[:, :, 37:] for x in (query, key, value)), *cut, is_causal=True, backend=backend)
    torch.testing.assert_close(padded[:, :, 37:], alone, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_large_scores_neither_overflow_nor_lose_a_row(backend):
    arguments = changed(inputs(1, 2, 150, dtype=torch.float32), lambda x: x)
    arguments = (100 * arguments[0].detach().requires_grad_(), *arguments[1:])
    want, got = (composable_attention(*arguments, is_causal=True, backend=b) for b in ("reference", backend))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------- gradients, determinism, memory
@pytest.mark.parametrize("backend", EVERY)
def test_gradcheck(backend):
    arguments = inputs(1, 2, 5, 6, 3, 2)
    mask = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool)

    def call(query, key, value, *maps):
        pre, post = HeadComposition(*maps[:7]), HeadComposition(*maps[7:])
        return composable_attention(query, key, value, pre, post, is_causal=True, attn_mask=mask, backend=backend)

    assert torch.autograd.gradcheck(call, leaves(*arguments))


def test_result_does_not_depend_on_threads_or_batch():
    arguments = inputs(3, 4, 300, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(results(arguments, is_causal=True, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
    one = changed(arguments, lambda x: x if x.ndim == 2 else x[1:2])
    assert torch.equal(composable_attention(*one, is_causal=True, backend="cpu")[0], found[0][0][1])


@pytest.mark.parametrize("backend", FAST)
def test_only_the_gradients_asked_for_are_given(backend):
    query, key, value, pre, post = inputs()
    key, post = key.detach(), HeadComposition(*(x.detach() for x in post))
    output = composable_attention(query, key, value, pre, post, backend=backend)
    output.sum().backward()
    assert key.grad is None
    assert all(x.grad is None for x in post)
    assert all(x.grad is not None for x in (query, value, *pre))
    with torch.no_grad():
        assert not composable_attention(query, key, value, pre, post, backend=backend).requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_memory_is_linear(backend):
    """In a process of its own: four times the tokens must not take half of one head's 268 MB of scores more.

    What a process takes once (modules loaded at the first backward pass, the allocator's reserves) is some 200 MB,
    uncertain by tens: it is paid at the smaller size, twice, before anything is compared.
    """
    import subprocess
    import sys

    code = (
        "import sys, threading, torch; sys.path.insert(0, 'tests/ops')\n"
        "from composable_inputs import inputs, results\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "def run(n):\n"
        "    parts = {'query_in', 'query_out', 'key_in', 'key_out'}\n"
        f"    options = {{'is_causal': True, 'backend': '{backend}'}}\n"
        "    results(inputs(1, 1, n, dtype=torch.float32, dim=8, parts=parts), **options)\n"
        "    return peak()\n"
        "torch.set_num_threads(2); run(2048); small = run(2048); print((run(8192) - small) // 1024)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 134, f"{out.stdout} MB more"
