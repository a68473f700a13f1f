"""Composable multi-head attention as a module: zero maps, variants, sequences, cache."""

import pytest
import torch
import torch.nn.functional as F

from coterie.attention import ComposableMultiHeadAttention, GlobalAttention, HeadMaps, KeyCache

DIM, HEADS = 24, 4


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(**options):
    torch.manual_seed(0)
    m = ComposableMultiHeadAttention(DIM, HEADS, **options).double().eval()
    loosen(m.maps)
    return m


def loosen(maps):
    """Maps far from the identity, so that what they do shows."""
    with torch.no_grad():
        for parameter, std in maps.initial_stds():
            parameter.mul_(0.3 / std)


def naive(m, x, context=None, allowed=None):
    """The mechanism with explicit N x N matrices for every pair of tokens."""
    keys = x if context is None else context
    q, k, v = m.project(x, context)
    k, v = (t.repeat_interleave(HEADS // m.kv_heads, dim=1) for t in (k, v))
    pre, post = m.maps(x, context)
    scores = torch.einsum("bnts,btsnm->bmts", q @ k.transpose(-1, -2) * m.scale, matrices(pre, x, keys))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    weights = torch.einsum("bnts,btsnm->bmts", scores.softmax(-1), matrices(post, x, keys))
    return m.proj((weights @ v).transpose(1, 2).flatten(2))


def matrices(maps, x, keys):
    eye = torch.eye(HEADS, dtype=x.dtype)
    total = eye.expand(x.shape[0], x.shape[1], keys.shape[1], -1, -1)
    if maps.static is not None:
        total = total + maps.static
    for side, at in (("query", 2), ("key", 1)):
        inner, outer, gate = (getattr(maps, f"{side}_{part}") for part in ("in", "out", "gate"))
        if inner is not None:
            total = total + (torch.einsum("btrn,btrm->btnm", inner, outer) + torch.diag_embed(gate)).unsqueeze(at)
    return total


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 1, "qk_norm": True},
        {"sides": ("query",)},
        {"sides": ("key",)},
        {"sides": (), "static": True},
        {"static": True, "rank": 1},
        {"uses": ("pre",), "rank": 3},
        {"uses": ("post",), "static": True},
        {"uses": ()},
    ],
)
def test_against_explicit_matrices(options):
    m = make(**options)
    x, context = tokens(2, 7, DIM), tokens(2, 9, DIM, seed=2)
    torch.testing.assert_close(m(x), naive(m, x))
    torch.testing.assert_close(m(x, context), naive(m, x, context))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(m(x, is_causal=True), naive(m, x, allowed=causal))
    near = causal & ~torch.ones(7, 7, dtype=torch.bool).tril(-3)
    m.window = 3
    torch.testing.assert_close(m(x, is_causal=True), naive(m, x, allowed=near))


@pytest.mark.parametrize("options", [{}, {"static": True}, {"sides": ("query",)}, {"uses": ()}])
def test_with_zero_maps_it_is_multi_head_attention(options):
    torch.manual_seed(0)
    m = ComposableMultiHeadAttention(DIM, HEADS, initial="zero", **options).double()
    plain = GlobalAttention(DIM, HEADS).double()
    assert not plain.load_state_dict(m.state_dict(), strict=False).missing_keys
    x, context = tokens(2, 4, 3, DIM), tokens(2, 9, DIM, seed=2)
    for args, kwargs in [((x,), {}), ((x, context), {}), ((x,), {"is_causal": True})]:
        torch.testing.assert_close(m(*args, **kwargs), plain(*args, **kwargs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("static", [False, True])
def test_zero_maps_can_be_trained(static):
    torch.manual_seed(0)
    m = ComposableMultiHeadAttention(DIM, HEADS, initial="zero", static=static).double()
    x, target = tokens(4, 6, DIM), tokens(4, 6, DIM, seed=2)
    optimizer = torch.optim.SGD(m.maps.parameters(), lr=0.3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(F.mse_loss(m(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, parameter in m.maps.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_initial_maps_are_as_the_authors_draw_them():
    torch.manual_seed(0)
    dim, heads = 256, 16
    maps = HeadMaps(dim, heads, static=True)
    hidden = 2 * 2 * heads
    for parameter, std in [
        (maps.hidden.weight, (2 / (dim + hidden)) ** 0.5),
        (maps.gate.weight, 0.005 * (2 / (dim + heads)) ** 0.5),
        (maps.mix, 0.01 / (heads**0.5 * (heads + 2))),
        (maps.static_pre, 0.1 / heads**0.5),
    ]:
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.1)
    assert sum(p.numel() for p in HeadMaps(dim, heads).parameters()) == 20 * heads * dim + 64 * heads**2
    m = ComposableMultiHeadAttention(dim, heads)
    x = torch.randn(1, 12, dim)
    before = m(x)
    m.maps.set_identity()
    change = (m(x) - before).abs().max() / before.abs().max()
    assert 0 < float(change.detach()) < 0.05


def test_tiny_maps_are_normalised_in_float32():
    """At the start the mean square over heads is about eps: half precision would lose it."""
    torch.manual_seed(0)
    maps = HeadMaps(DIM, HEADS)
    x = tokens(1, 5, DIM).float()
    expected, _ = maps(x)
    half, _ = maps.bfloat16()(x.bfloat16())
    assert half.query_in.dtype == torch.bfloat16
    torch.testing.assert_close(half.query_in.float(), expected.query_in, rtol=0.1, atol=0.03)


def test_permuting_heads_consistently_changes_nothing():
    m, order = make(), torch.tensor([2, 0, 3, 1])
    x = tokens(2, 6, DIM)
    expected = m(x)
    with torch.no_grad():
        heads = m.qkv.weight.view(3, HEADS, -1, DIM)
        m.qkv.weight.copy_(heads[:, order].reshape(3 * DIM, DIM))
        m.qkv.bias.copy_(m.qkv.bias.view(3, HEADS, -1)[:, order].flatten())
        m.proj.weight.copy_(m.proj.weight.view(DIM, HEADS, -1)[:, order].flatten(1))
        m.maps.mix.copy_(m.maps.mix[..., order])
        m.maps.gate.weight.copy_(m.maps.gate.weight.view(4, HEADS, DIM)[:, order].flatten(0, 1))
    torch.testing.assert_close(m(x), expected)


def test_rotary_positions_are_relative():
    m = make(rotary=100.0, rotary_fraction=0.67)
    assert m.rotary_dim == 4
    x = tokens(1, 9, DIM)
    padded = torch.cat([tokens(1, 4, DIM, seed=3), x], dim=1)
    mask = torch.arange(13)[None] >= 4
    torch.testing.assert_close(m(padded, mask=mask)[:, 4:], m(x))
    assert not torch.allclose(m(x.flip(1)).flip(1), m(x))
    torch.testing.assert_close(m(x[:, 5:], x, is_causal=True), m(x, is_causal=True)[:, 5:])


CACHED = [
    {"rotary": 100.0},
    {"rotary": 100.0, "window": 4, "kv_heads": 2, "qk_norm": True},
    {"window": 1},
    {"window": 3, "sides": ("query",)},
    {"uses": ("post",), "static": True},
]


@pytest.mark.parametrize("options", CACHED)
@pytest.mark.parametrize("chunks", [[1] * 11, [11], [5, 6], [4, 1, 1, 3, 2], [3, 1, 7]])
def test_decoding_in_any_chunks_is_one_call(options, chunks):
    m, x = make(**options), tokens(2, 11, DIM)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, :3] = False  # left padding
    for padding in (None, mask):
        cache, outputs = KeyCache(), []
        for part, part_mask in zip(x.split(chunks, 1), mask.split(chunks, 1)):
            part_mask = None if padding is None else part_mask
            outputs.append(m(part, mask=part_mask, is_causal=True, cache=cache))
        torch.testing.assert_close(torch.cat(outputs, 1), m(x, mask=padding, is_causal=True))
        assert cache.seen == 11
        if options.get("window"):
            assert cache.key.shape[2] == options["window"] - 1


def test_padding_may_start_late_in_a_cache():
    m, x = make(), tokens(2, 6, DIM)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4] = False
    cache = KeyCache()
    first = m(x[:, :4], is_causal=True, cache=cache)
    then = m(x[:, 4:5], mask=mask[:, 4:5], is_causal=True, cache=cache)
    last = m(x[:, 5:], is_causal=True, cache=cache)
    torch.testing.assert_close(torch.cat([first, then, last], 1), m(x, mask=mask, is_causal=True))


def test_the_cache_holds_ten_numbers_per_head_and_token():
    m, cache = make(), KeyCache()
    m(tokens(2, 7, DIM), is_causal=True, cache=cache)
    assert [tuple(part.shape) for part in cache.maps] == [(2, 7, 5, HEADS)] * 2
    query_only, cache = make(sides=("query",)), KeyCache()
    query_only(tokens(2, 7, DIM), is_causal=True, cache=cache)
    assert cache.maps == (None, None)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kv_heads": 3}, ValueError, "kv_heads must divide num_heads, got kv_heads=3 and num_heads=4"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window must be an int"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rotary_fraction": 0.0}, ValueError, "rotary_fraction must be above 0 and at most 1, got 0.0"),
        ({"rotary": 100.0, "rotary_fraction": 0.5}, ValueError, "channels that rotate must be even .*, got 3"),
        ({"rotary": -1.0}, ValueError, "rotary must be a base above 0, or None, got -1.0"),
        ({"uses": ("before",)}, ValueError, r"uses must be a tuple out of 'pre', 'post', got \('before',\)"),
        ({"sides": "query"}, ValueError, "sides must be a tuple out of 'query', 'key', got 'query'"),
        ({"initial": "large"}, ValueError, "initial must be one of 'small', 'zero', got 'large'"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        ComposableMultiHeadAttention(DIM, HEADS, **options)


def test_bad_calls():
    x = torch.randn(2, 5, DIM)
    m = ComposableMultiHeadAttention(DIM, HEADS, rotary=100.0)
    for options, args, kwargs, text in [
        ({}, (x,), {"cache": KeyCache()}, "takes a cache in causal self-attention only"),
        ({}, (x, x), {"cache": KeyCache(), "is_causal": True}, "takes a cache in causal self-attention only"),
        ({"window": 2}, (torch.randn(2, 5, 5, DIM),), {}, "window is along a sequence .*, got a 2-dimensional grid"),
        ({"rotary": 10.0}, (x, torch.randn(2, 2, 2, DIM)), {}, "rotary is along a sequence"),
        ({"rotary": 10.0}, (x, x[:, :3]), {}, "at least as many keys as queries, got 5 queries and 3 keys"),
    ]:
        with pytest.raises(ValueError, match=text):
            ComposableMultiHeadAttention(DIM, HEADS, **options)(*args, **kwargs)
    cache = KeyCache()
    m(x, is_causal=True, cache=cache)
    with pytest.raises(ValueError, match="x must have the batch size of the cache, 2, got 1"):
        m(x[:1], is_causal=True, cache=cache)
