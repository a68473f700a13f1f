"""DynamicGroupAttention against a brute-force softmax with a boolean mask, in float64."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from coterie.attention import DynamicGroupAttention, GlobalAttention, follow_learning_rate


def make(dim=12, heads=3, *, groups=4, top_k=5, seed=0, **options):
    torch.manual_seed(seed)
    return DynamicGroupAttention(dim, heads, groups=groups, top_k=top_k, **options).double().eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(m, x, context=None, mask=None, chosen=None):
    """Dense softmax attention with m's weights; `chosen` (batch, heads, queries, keys) says who may attend to whom."""
    context = x if context is None else context
    batch, heads, dim = x.shape[0], m.num_heads, m.dim
    weight_q, weight_k, weight_v = m.qkv.weight.split(dim)
    bias_q, bias_k, bias_v = m.qkv.bias.split(dim)

    def split(y):
        return y.reshape(batch, -1, heads, dim // heads).transpose(1, 2)

    q, k, v = split(x @ weight_q.T + bias_q), split(context @ weight_k.T + bias_k), split(context @ weight_v.T + bias_v)
    if m.similarity == "cosine":
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        scores = (q @ k.transpose(-1, -2)) * m.logit_scale.exp().clamp(max=100)
    else:
        scores = (q @ k.transpose(-1, -2)) * (dim // heads) ** -0.5
    allowed = torch.ones_like(scores, dtype=torch.bool) if chosen is None else chosen
    if mask is not None:
        allowed = allowed & mask.flatten(1)[:, None, None]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    y = (weights @ v).transpose(1, 2).reshape(x.shape)
    return y @ m.proj.weight.T + m.proj.bias


def brute_choice(m, x, context=None, mask=None):
    """Who may attend to whom, by the definition, one query at a time."""
    context = x if context is None else context
    q, k, _ = m.project(x, context)
    chosen = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if mask is None else mask.flatten(1)
    for b in range(q.shape[0]):
        for h in range(m.num_heads):
            unit = m.centroids[h] / m.centroids[h].norm(dim=-1, keepdim=True)
            keys = k[b, h] / k[b, h].norm(dim=-1, keepdim=True) if m.normalize_keys else k[b, h]
            for i, query in enumerate(q[b, h]):
                if m.metric == "l2":
                    group = int((query - m.centroids[h]).norm(dim=-1).argmin())
                else:
                    group = int((unit if m.metric == "cosine" else m.centroids[h]).matmul(query).argmax())
                score = (keys @ unit[group]).masked_fill(~real[b], float("-inf"))
                chosen[b, h, i, score.topk(min(m.top_k, int(real[b].sum()))).indices] = True
    return chosen


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot"])
@pytest.mark.parametrize("normalize_keys", [False, True])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_equals_dense_softmax_under_the_chosen_mask(metric, normalize_keys, similarity):
    m = make(metric=metric, normalize_keys=normalize_keys, similarity=similarity)
    x = tokens(2, 3, 5, 12)
    torch.testing.assert_close(m(x), plain(m, x.flatten(1, 2), chosen=brute_choice(m, x)).view(x.shape))


def test_every_query_sees_exactly_top_k_keys_and_those_of_its_group():
    m, x = make(top_k=5), tokens(2, 17, 12)
    assignment, selected = m.groups_of(x)
    assert assignment.shape == (2, 3, 17)
    assert selected.shape == (2, 3, 4, 5)
    chosen = torch.zeros(2, 3, 4, 17, dtype=torch.bool).scatter(-1, selected, True)
    assert (chosen.sum(-1) == 5).all()
    assert torch.equal(chosen.gather(2, assignment.unsqueeze(-1).expand(-1, -1, -1, 17)), brute_choice(m, x))


def test_cross_attention_and_its_mask():
    m, x, context = make(), tokens(2, 7, 12), tokens(2, 3, 4, 12, seed=2)
    mask = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3)) > 0.4
    expected = plain(m, x, context.flatten(1, 2), mask, brute_choice(m, x, context.flatten(1, 2), mask))
    torch.testing.assert_close(m(x, context, mask=mask), expected)
    assert m.groups_of(x, context, mask=mask)[1].max() < 12


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("training", [False, True])
def test_top_k_of_all_tokens_is_plain_attention(similarity, training):
    m, x = make(top_k=15, similarity=similarity), tokens(2, 15, 12)
    exact = GlobalAttention(12, 3, similarity=similarity).double()
    exact.load_state_dict({k: v for k, v in m.state_dict().items() if k != "centroids"})
    y = m.train(training)(x)
    torch.testing.assert_close(y, plain(m, x))
    torch.testing.assert_close(y, exact(x))
    if training:
        assert m._counts.sum() == 2 * 3 * 15


def test_permuting_tokens_permutes_the_output():
    m, x = make(), tokens(2, 19, 12)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(m(x)[:, order], m(x[:, order]))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_gradients_are_those_of_the_dense_mask(similarity):
    m, x = make(similarity=similarity), tokens(2, 17, 12).requires_grad_()
    weight = tokens(2, 17, 12, seed=5)
    (m(x) * weight).sum().backward()
    got = [x.grad.clone(), *(p.grad.clone() for p in m.parameters())]
    x.grad = None
    m.zero_grad()
    (plain(m, x, chosen=brute_choice(m, x)) * weight).sum().backward()
    for a, b in zip(got, [x.grad, *(p.grad for p in m.parameters())], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("top_k", [5, 40])
def test_padding_changes_nothing(top_k):
    m, x = make(top_k=top_k), tokens(2, 11, 12)
    padded = torch.cat([x, 100 * tokens(2, 6, 12, seed=6)], 1)
    mask = torch.arange(17).expand(2, 17) < 11
    torch.testing.assert_close(m(padded, mask=mask)[:, :11], m(x))
    m.train()
    m(padded, mask=mask)
    sums, counts = m._sums.clone(), m._counts.clone()
    m.forget_queries()
    m(x)
    torch.testing.assert_close(sums, m._sums)
    assert torch.equal(counts, m._counts)


def test_a_sample_that_is_all_padding_gives_the_bias_only():
    m, x = make(), tokens(2, 9, 12).requires_grad_()
    mask = torch.tensor([[True] * 9, [False] * 9])
    y = m(x, mask=mask)
    torch.testing.assert_close(y[1], m.proj.bias.expand(9, 12))
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_global_tokens_see_and_are_seen_by_all():
    m, x = make(global_tokens=2), tokens(2, 14, 12)
    assignment, selected = m.groups_of(x)
    assert assignment.shape == (2, 3, 12)
    assert selected.shape == (2, 3, 4, 7)
    assert torch.equal(selected[..., :2], torch.arange(2).expand(2, 3, 4, 2))
    assert (selected[..., 2:] >= 2).all()
    chosen = torch.zeros(2, 3, 4, 14, dtype=torch.bool).scatter(-1, selected, True)
    rows = chosen.gather(2, assignment.unsqueeze(-1).expand(-1, -1, -1, 14))
    chosen = torch.cat([torch.ones(2, 3, 2, 14, dtype=torch.bool), rows], 2)
    torch.testing.assert_close(m(x), plain(m, x, chosen=chosen))
    m.train()(x)
    assert m._counts.sum() == 2 * 3 * 12
    for bad in (tokens(2, 4, 4, 12), tokens(2, 2, 12)):
        with pytest.raises(ValueError, match="global_tokens=2"):
            m(bad)
    with pytest.raises(ValueError, match="context"):
        m(x, x)


def test_global_tokens_with_a_mask_and_top_k_of_all():
    m, x = make(global_tokens=1, top_k=13), tokens(2, 14, 12)
    mask = torch.rand(2, 14, generator=torch.Generator().manual_seed(7)) > 0.3
    torch.testing.assert_close(m(x, mask=mask), plain(m, x, mask=mask))
    m.top_k = 3
    assert m(x, mask=mask).isfinite().all()


def test_logit_scale_starts_at_ten_and_stops_at_a_hundred():
    m, x = make(similarity="cosine", top_k=99), tokens(1, 9, 12)
    assert m.logit_scale.shape == (3, 1, 1)
    torch.testing.assert_close(m.logit_scale.exp(), torch.full((3, 1, 1), 10.0, dtype=torch.float64))
    assert m.no_weight_decay() == {"logit_scale"}
    with torch.no_grad():
        m.logit_scale.fill_(9.0)
        at_limit = m(x)
        m.logit_scale.fill_(50.0)
        torch.testing.assert_close(m(x), at_limit)


def test_autocast_keeps_centroids_wide_and_output_close():
    m = make().float()
    x = tokens(2, 30, 12).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.train()(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert m.centroids.dtype == torch.float32
    assert m._sums.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())
    half = make().float().to(torch.bfloat16)
    assert half.qkv.weight.dtype == torch.bfloat16
    assert half.centroids.dtype == torch.float32
    assert half.train()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_queries_once(reentrant, told):
    m, x = make().train(), tokens(2, 9, 12).requires_grad_()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
    if told:
        follow_learning_rate(m, optimizer)
    centroids = m.centroids.clone()
    m(x).sum().backward()
    sums, counts, grad = m._sums.clone(), m._counts.clone(), x.grad.clone()
    m.forget_queries()
    x.grad = None
    checkpoint(m, x, use_reentrant=reentrant).sum().backward()
    torch.testing.assert_close(m._sums, sums)
    assert torch.equal(m._counts, counts)
    assert counts.sum() == 2 * 3 * 9
    torch.testing.assert_close(x.grad, grad)
    assert torch.equal(m.centroids, centroids)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int"),
        ({"metric": "l1"}, ValueError, "metric must be one of 'cosine', 'l2', 'dot', got 'l1'"),
        ({"similarity": "euclid"}, ValueError, "similarity must be one of"),
        ({"centroid_rate": -1.0}, ValueError, "centroid_rate"),
        ({"default_tau": 2.0}, ValueError, "default_tau"),
        ({"default_tau": "fast"}, TypeError, "default_tau"),
        ({"global_tokens": -1}, ValueError, "global_tokens"),
    ],
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        DynamicGroupAttention(12, 3, **options)


def test_bad_backend_and_bad_centroids():
    m, x = make(backend="fastest"), tokens(1, 9, 12)
    with pytest.raises(ValueError, match="fastest"):
        m(x)
    m = make()
    with torch.no_grad():
        m.centroids[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="centroids holds NaN"):
        m(x)
    with pytest.raises(RuntimeError, match="centroids holds NaN or infinity: the checkpoint is damaged"):
        make().load_state_dict(m.state_dict())
