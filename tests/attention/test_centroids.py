"""Centroids move once per optimizer step, by the learning rate, whatever the training loop does."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import coterie.attention.centroids as centroids_module
from coterie.attention import DynamicGroupAttention, follow_learning_rate, initialize_centroids
from coterie.attention.kmeans import spherical_kmeans


@pytest.fixture(autouse=True)
def _not_yet_warned(monkeypatch):
    monkeypatch.setattr(centroids_module, "_warned", False)


class Net(nn.Module):
    """Two blocks of dynamic group attention between linear layers."""

    def __init__(self, **options):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.first = DynamicGroupAttention(8, 2, groups=4, top_k=3, **options)
        self.second = DynamicGroupAttention(8, 2, groups=3, top_k=5, **options)

    def forward(self, x, mask=None):
        x = x + self.first(self.inner(x), mask=mask)
        return x + self.second(x, mask=mask)


def net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).double()


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def modules(model):
    return [m for m in model.modules() if isinstance(m, DynamicGroupAttention)]


def state(model):
    return [m.centroids.clone() for m in modules(model)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def expected(m, x, tau):
    """The card's formula for one module and one batch, group by group."""
    query = m.project(x)[0]
    assignment, _ = m.groups_of(x)
    new = m.centroids.clone()
    for h in range(m.num_heads):
        for j in range(m.groups):
            members = query[:, h][assignment[:, h] == j]
            if len(members):
                mean = F.normalize(members.mean(0), dim=0)
                new[h, j] = F.normalize((1 - tau) * F.normalize(m.centroids[h, j], dim=0) + tau * mean, dim=0)
    return new


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_one_step_is_the_formula(rate):
    model, x = net(centroid_rate=rate), tokens(2, 9, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    follow_learning_rate(model, optimizer)
    want = expected(model.first, model.inner(x), rate * 0.2).detach()
    model.train()(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.first.centroids, want)
    torch.testing.assert_close(model.first.centroids.norm(dim=-1), torch.ones(2, 4, dtype=torch.float64))
    assert model.first._counts.sum() == 0
    assert model.first._sums.abs().sum() == 0


def test_the_rate_is_that_of_the_parameter_group_and_follows_its_schedule():
    model, x = net(), tokens(2, 9, 8)
    groups = [{"params": model.first.parameters(), "lr": 0.0}, {"params": model.second.parameters(), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    follow_learning_rate(model, optimizer)
    before = state(model)
    model.train()(x).sum().backward()
    optimizer.step()
    schedule.step()
    assert torch.allclose(model.first.centroids, before[0], atol=1e-15)
    assert not torch.allclose(model.second.centroids, before[1], atol=1e-4)
    before = state(model)
    model(x).sum().backward()
    optimizer.step()
    assert torch.allclose(model.second.centroids, before[1], atol=1e-15)


def test_two_micro_batches_are_one_batch_and_evaluation_does_not_count():
    x, moved = tokens(4, 9, 8), []
    for parts in ([x], [x[:1], x[1:]]):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        follow_learning_rate(model, optimizer)
        for part in parts:
            model.train()(part).sum().backward()
            model.eval()(100 * part)
        optimizer.step()
        moved.append(state(model))
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_does_not_move_centroids():
    x, moved = tokens(2, 9, 8), []
    padded = torch.cat([x, 100 * tokens(2, 4, 8, seed=3)], 1)
    padded[:, -1] = math.nan
    mask = torch.arange(13).expand(2, 13) < 9
    for args in ((x, None), (padded.nan_to_num(7.0), mask)):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        follow_learning_rate(model, optimizer)
        model.train()(*args).sum().backward()
        optimizer.step()
        moved.append(state(model))
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b)
    m = modules(net())[0].train()
    m.observe_queries(
        torch.full((1, 2, 3, 4), math.nan, dtype=torch.float64),
        torch.zeros(1, 2, 3, dtype=torch.int64),
        torch.tensor([[False, False, False]]),
    )
    assert m._sums.isfinite().all()
    assert m._counts.sum() == 0


def test_empty_and_non_finite_groups_stay():
    m = modules(net())[0].train()
    optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
    follow_learning_rate(m, optimizer)
    query = tokens(1, 2, 4, 4)
    query[0, 0, 0] = math.inf
    query[0, 0, 1] = math.nan
    m.observe_queries(query, torch.tensor([[[0, 1, 2, 2], [0, 0, 0, 0]]]), None)
    before = m.centroids.clone()
    optimizer.step()
    changed = (m.centroids != before).any(-1)
    assert changed.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert m._sums.isfinite().all()
    m.observe_queries(-m.centroids[None], torch.arange(4).expand(1, 2, 4), None)
    optimizer.param_groups[0]["lr"] = 5.0  # tau = 1/2 towards the opposite direction: nothing is left to normalise
    before = m.centroids.clone()
    optimizer.step()
    assert torch.equal(m.centroids, before)


def test_a_step_that_the_scaler_skips_does_not_count():
    model, x = net().float(), tokens(2, 9, 8).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    follow_learning_rate(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = state(model)
    scaler.scale(model.train()(x).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(state(model), before)
    optimizer.zero_grad()
    scaler.scale(model(x).sum()).backward()
    scaler.step(optimizer)
    assert not same(state(model), before)


def test_never_told_moves_by_the_default_and_warns_once():
    model, x = net(default_tau=0.05), tokens(2, 9, 8)
    want = expected(model.first, model.inner(x), 0.05).detach()
    before = state(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()(x)
        model.eval()(x)
        model.train()(x)
        assert same(state(model), before)
        assert not caught
        for _ in range(3):
            net().train()(x)
            model(x)
        other = net().train()
        other(x)
        other(x)
    assert len(caught) == 1
    assert "coterie.follow_learning_rate(model, optimizer)" in str(caught[0].message)
    model = net(default_tau=0.05).train()
    model(x)
    model(x)
    torch.testing.assert_close(model.first.centroids, want)


def test_told_does_not_warn_and_remove_untells():
    model, x = net(), tokens(2, 9, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = follow_learning_rate(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.train()(x).sum().backward()
            optimizer.step()
    handle.remove()
    before = state(model)
    optimizer.step()
    assert same(state(model), before)
    model(x)
    with pytest.warns(UserWarning, match="follow_learning_rate"):
        model(x)


def test_a_second_optimizer_takes_over_and_a_dead_one_lets_go():
    model, x = net(), tokens(2, 9, 8)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    follow_learning_rate(model, first)
    follow_learning_rate(model, second)
    model.train()(x).sum().backward()
    before = state(model)
    first.step()
    assert same(state(model), before)
    second.step()
    assert not same(state(model), before)
    del second
    assert all(m._follower is None for m in modules(model))


def test_copies_are_independent_and_not_followed():
    model, x = net(), tokens(2, 9, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    follow_learning_rate(model, optimizer)
    model.train()(x).sum().backward()
    ema = copy.deepcopy(model).eval()
    pickled = pickle.loads(pickle.dumps(model))
    before = state(ema)
    optimizer.step()
    assert same(state(ema), before)
    assert same(state(pickled), before)
    assert not same(state(model), before)
    for other in (ema, pickled):
        assert all(m._follower is None for m in modules(other))
        assert modules(other)[0]._sums.data_ptr() != modules(model)[0]._sums.data_ptr()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    averaged.update_parameters(model)
    first = state(model)
    model(x).sum().backward()
    optimizer.step()
    averaged.update_parameters(model)
    for a, b, c in zip(state(averaged), first, state(model), strict=True):
        torch.testing.assert_close(a, 0.9 * b + 0.1 * c)


def test_state_dict_holds_centroids_and_nothing_pending():
    model, x = net(), tokens(2, 9, 8)
    model.train()(x)
    saved = model.state_dict()
    assert sorted(k for k in saved if "weight" not in k and "bias" not in k) == ["first.centroids", "second.centroids"]
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    other = net(seed=5)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    model.load_state_dict(saved)
    assert model.first._counts.sum() == 0
    halved = {k: v.to(torch.bfloat16) for k, v in saved.items()}
    with torch.device("meta"):
        empty = Net()
    empty.load_state_dict(halved, assign=True)
    assert empty.first.qkv.weight.dtype == torch.bfloat16
    assert empty.first.centroids.dtype == torch.float32
    empty.train()(x.bfloat16())
    assert empty.first._counts.sum() == 2 * 2 * 9


def test_meta_construction():
    with torch.device("meta"):
        model = Net()
    assert model.first.centroids.is_meta
    model.to_empty(device="cpu")
    for m in modules(model):
        m.qkv.reset_parameters()
        m.proj.reset_parameters()
        m.reset_centroids()
        torch.testing.assert_close(m.centroids.norm(dim=-1), torch.ones(2, m.groups))
        assert m._counts.sum() == 0
    model.inner.reset_parameters()
    model.train()(tokens(1, 5, 8).float())
    assert model.first._counts.sum() == 10


def test_frozen_and_foreign_optimizers():
    model, x = net(), tokens(2, 9, 8)
    model.first.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    follow_learning_rate(model, optimizer)
    before = state(model)
    model.train()(x).sum().backward()
    optimizer.step()
    assert torch.equal(model.first.centroids, before[0])
    assert not torch.equal(model.second.centroids, before[1])
    assert model.first._counts.sum() == 0
    with pytest.raises(ValueError, match="optimizer must be the one that trains the model"):
        follow_learning_rate(net(), optimizer)
    with pytest.raises(ValueError, match="model must contain dynamic group attention, got Linear"):
        follow_learning_rate(nn.Linear(2, 2), optimizer)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got float"):
        follow_learning_rate(model, 0.1)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        follow_learning_rate("model", optimizer)


def test_an_accelerate_like_wrapper_is_looked_through():
    class Wrapped:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    follow_learning_rate(model, Wrapped(optimizer))
    assert len(optimizer._optimizer_step_post_hooks) == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_forward_counts_like_the_eager_one(backend):
    torch._dynamo.reset()
    eager, x = net().first.train(), tokens(2, 9, 8)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for module, run in ((eager, eager), (twin, compiled)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        follow_learning_rate(module, optimizer)
        for _ in range(2):
            run(x).square().sum().backward()
            run(x + 1).square().sum().backward()
            assert module._counts.sum() == 2 * 2 * 2 * 9
            optimizer.step()
    for a, b in zip(eager.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_operators_pass_opcheck():
    sums, counts = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    query, assignment = torch.randn(1, 2, 5, 3), torch.randint(0, 4, (1, 2, 5))
    for mask in (None, torch.tensor([[True, True, False, True, True]])):
        torch.library.opcheck(torch.ops.coterie.observe_queries.default, (sums, counts, query, assignment, mask))
    centroids_module._warned = True
    torch.library.opcheck(
        torch.ops.coterie.settle_centroids.default, (F.normalize(torch.randn(2, 4, 3), dim=-1), sums, counts, 0.1)
    )


def test_initialize_centroids_finds_clusters_and_keeps_everything_else():
    model = net()
    with torch.no_grad():  # queries of the first block are its inputs, so clusters of tokens are clusters of queries
        model.inner.weight.copy_(torch.eye(8))
        model.inner.bias.zero_()
        model.first.qkv.weight[:8] = torch.eye(8)
        model.first.qkv.bias.zero_()
    centres = F.normalize(tokens(4, 2, 4, seed=9), dim=-1)
    which = torch.randint(0, 4, (2, 40), generator=torch.Generator().manual_seed(2))
    x = (centres[which] + 0.01 * tokens(2, 40, 2, 4)).flatten(2)
    model.train()
    model.second.eval()
    weights = {k: v.clone() for k, v in model.state_dict().items() if "centroids" not in k}
    assert initialize_centroids(model, x) == ["first", "second"]
    close = torch.einsum("hgd,chd->hgc", model.first.centroids, centres)
    assert (close.amax(1) > 0.99).all()
    assert model.training
    assert not model.second.training
    assert model.first._counts.sum() == 0
    for k, v in weights.items():
        assert torch.equal(model.state_dict()[k], v)
    copies = [net(), net()]
    for model in copies:
        initialize_centroids(model, x, max_tokens=20, seed=3)
    assert same(state(copies[0]), state(copies[1]))


def test_initialize_centroids_leaves_out_padding_and_keeps_fresh_batch_norms():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.attention = DynamicGroupAttention(8, 2, groups=3, top_k=4)

        def forward(self, x, mask=None):
            return self.attention(self.norm(x.transpose(1, 2)).transpose(1, 2), mask=mask)

    torch.manual_seed(0)
    model, x = Normed(), 50 + tokens(2, 12, 8).float()
    initialize_centroids(model, x)
    assert model.norm.num_batches_tracked == 0
    assert model.norm.running_mean.abs().sum() == 0
    assert model.norm.momentum == 0.1
    spread = model.attention.centroids[0] @ model.attention.centroids[0].T
    assert spread.min() < 0.5  # with running statistics, all queries would point to where 50 is
    a, b = net(), net()
    x = tokens(2, 12, 8)
    initialize_centroids(a, x)
    padded, mask = torch.cat([x, 9 * tokens(2, 5, 8)], 1), torch.arange(17).expand(2, 17) < 12
    initialize_centroids(b, padded, mask=mask)
    torch.testing.assert_close(a.first.centroids, b.first.centroids)


def test_initialize_centroids_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="model must contain dynamic group attention"):
        initialize_centroids(nn.Linear(2, 2), torch.randn(1, 2))
    model = net()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="inputs must reach a module with centroids"):
        initialize_centroids(model, tokens(1, 3, 8))


def test_kmeans_with_fewer_directions_than_groups_keeps_the_rest():
    points = F.normalize(tokens(1, 2, 4), dim=-1)[:, [0, 1, 0, 1, 0]]
    start = F.normalize(tokens(1, 4, 4, seed=8), dim=-1)
    found = spherical_kmeans(points, start, iterations=3, generator=torch.Generator().manual_seed(0))
    near = (found[0] @ points[0].T).amax(-1) > 1 - 1e-9
    assert near.sum() == 2
    torch.testing.assert_close(found[0][~near], start[0][~near])
