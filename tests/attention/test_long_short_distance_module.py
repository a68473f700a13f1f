"""Long short distance attention: which tokens a group holds, position bias, padding, and options."""

import pytest
import torch

from coterie.attention import create_attention
from coterie.attention.long_short_distance import DynamicPositionBias, Groups, LongShortDistanceAttention

DIM, HEADS = 12, 3


def make(block_index=0, **options):
    torch.manual_seed(0)
    bias = options.pop("dynamic_position_bias", True)
    made = create_attention(
        "long_short_distance", DIM, HEADS, block_index=block_index, dynamic_position_bias=bias,
        **{"dtype": torch.float64, **options},
    )  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.eval()


def tokens(*grid, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *grid, DIM, dtype=torch.float64, generator=generator)


def neighbours(module, grid):
    """Who attends to whom, (tokens, tokens), found by looking at gradients."""
    x = tokens(*grid, batch=1).requires_grad_()
    y = module(x).flatten(1, -2)[0]
    rows = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0].abs().sum(-1).flatten() > 1e-12 for row in y]
    return torch.stack(rows)


def test_short_distance_groups_are_neighbours_and_long_distance_ones_lie_an_interval_apart():
    row, column = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    short = (row // 3 * 4 + column // 3).flatten()
    assert torch.equal(neighbours(make(0, group_size=3, interval=2), (12, 12)), short[:, None] == short)
    # 3 tokens, 2 apart, from tiles of 6 rows and columns
    fixed = (row // 6 * 2 + row % 2) * 4 + column // 6 * 2 + column % 2
    assert torch.equal(
        neighbours(make(1, group_size=3, interval=2), (12, 12)), fixed.flatten()[:, None] == fixed.flatten()
    )
    growing = (row % 4 * 4 + column % 4).flatten()  # 3 tokens, 4 apart: all over the grid
    assert torch.equal(neighbours(make(1, group_size=3), (12, 12)), growing[:, None] == growing)


def test_long_distance_is_short_distance_after_a_permutation():
    """Token t of an axis goes to place (t mod I) G + t div I, I the interval and G the group size."""
    long, short = make(1, group_size=3, interval=4), make(0, group_size=3, interval=4)
    place = torch.arange(12) % 4 * 3 + torch.arange(12) // 4
    x = tokens(12, 12)
    permuted = torch.empty_like(x)
    permuted[:, place[:, None], place] = x
    torch.testing.assert_close(long(x), short(permuted)[:, place[:, None], place])


@pytest.mark.parametrize("options", [{"group_size": 3, "interval": 1}, {"group_size": 12}, {"group_size": 40}])
def test_without_an_interval_and_with_large_groups_both_kinds_are_the_same(options):
    x = tokens(12, 12)
    torch.testing.assert_close(make(1, **options)(x), make(0, **options)(x))


@pytest.mark.parametrize(("group_size", "interval"), [(4, 2), (3, 4)])
def test_short_then_long_links_every_pair_where_a_group_has_as_many_tokens_as_an_interval(group_size, interval):
    side = group_size * interval
    short, long = (neighbours(make(b, group_size=group_size, interval=interval), (side, side)) for b in (0, 1))
    reached = (long.float() @ short.float()) > 0
    assert bool(reached.all()) == (group_size >= interval)


@pytest.mark.parametrize("block_index", [0, 1])
@pytest.mark.parametrize("grid", [(11,), (13, 10), (5, 4, 7)])
def test_at_any_size_the_kernel_and_torch_operators_and_the_definition_agree(grid, block_index):
    sizes = (3,) * len(grid)
    module = make(block_index, group_size=sizes, interval=2)
    x = tokens(*grid)
    kernel, groups = module(x), module.groups(grid)
    assert module._kernel_serves(x, groups)
    module._kernel_serves = lambda *_: False
    torch.testing.assert_close(module(x), kernel)
    qkv = module.qkv(x.flatten(1, -2)).view(2, -1, 3, HEADS, DIM // HEADS)
    bias, expected = module.pos(groups.size), torch.zeros(2, qkv.shape[1], HEADS, DIM // HEADS, dtype=x.dtype)
    for group in groups.tokens():
        there = (group >= 0).nonzero().flatten()
        query, key, value = qkv[:, group[there]].unbind(2)
        logits = torch.einsum("bihd,bjhd->bhij", query, key) * module.scale + bias[:, there][:, :, there]
        expected[:, group[there]] = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value)
    torch.testing.assert_close(kernel, module.proj(expected.flatten(2)).view(x.shape))


@pytest.mark.parametrize("interval", [2, "growing"])
@pytest.mark.parametrize("small_grids", ["axes", "shorter_side"])
@pytest.mark.parametrize("block_index", [0, 1])
def test_images_of_a_batch_are_cut_as_each_alone_whatever_the_padding(block_index, interval, small_grids):
    module = make(block_index, group_size=3, interval=interval, small_grids=small_grids)
    sizes = [(9, 8), (2, 7), (9, 3), (1, 1), (5, 9)]
    x = tokens(9, 9, batch=len(sizes))
    mask = torch.zeros(len(sizes), 9, 9, dtype=torch.bool)
    for row, (height, width) in enumerate(sizes):
        mask[row, :height, :width] = True
    for kernel in (True, False):
        if not kernel:
            module._kernel_serves = lambda *_: False
        y = module(x, mask=mask)
        for row, (height, width) in enumerate(sizes):
            torch.testing.assert_close(y[row, :height, :width], module(x[row : row + 1, :height, :width])[0])
    y = module(x[:1].expand(2, -1, -1, -1), mask=mask[:1].expand(2, -1, -1))  # images of one size go together
    torch.testing.assert_close(y[1, :9, :8], module(x[:1, :9, :8])[0])


def test_small_grids_go_by_axes_or_as_a_square():
    assert make(1, group_size=4, interval=2).groups((12, 3)) == Groups((12, 3), (4, 3), (2, 1))
    assert make(0, group_size=4, interval=2).groups((12, 3)) == Groups((12, 3), (4, 3), (1, 1))
    square = make(1, group_size=4, interval=2, small_grids="shorter_side")
    assert square.groups((12, 3)) == Groups((12, 3), (3, 3), (1, 1))
    assert square.groups((12, 6)) == Groups((12, 6), (4, 3), (2, 2))
    assert make(1, group_size=4).groups((12, 17)) == Groups((12, 17), (4, 4), (3, 5))


def test_position_bias_is_one_function_of_the_offset_for_every_size_of_groups():
    torch.manual_seed(0)
    network = DynamicPositionBias(6, HEADS, dtype=torch.float64)
    small, large = network((3, 2)), network((7, 7))  # a larger table needs no new weights
    place = torch.arange(49).view(7, 7)[2:5, 4:6].flatten()
    torch.testing.assert_close(small, large[:, place][:, :, place])
    offset = network.pos3(network.pos2(network.pos1(network.pos_proj(torch.tensor([2.0, -1.0], dtype=torch.float64)))))
    torch.testing.assert_close(small[:, 2 * 2 + 0, 0 * 2 + 1], offset)  # from (2, 0) to (0, 1)
    table = network.table((3, 2))
    assert table.shape == (5, 3, HEADS)
    torch.testing.assert_close(table[2 + 2, 1 - 1], offset)


def test_inference_computes_the_position_bias_once_and_notices_new_weights(monkeypatch):
    module, x, calls = make(1, group_size=3), tokens(9, 9), []
    original = DynamicPositionBias._bias
    monkeypatch.setattr(DynamicPositionBias, "_bias", lambda self, size: calls.append(size) or original(self, size))
    with torch.no_grad():
        first = module(x)
        assert torch.equal(module(x), first)
        assert calls == [(3, 3)]
        module(tokens(9, 6))
        assert calls == [(3, 3)]  # the same groups
        for change in (
            lambda: module.pos.pos_proj.weight.mul_(2),
            lambda: module.load_state_dict({**module.state_dict(), "pos.pos_proj.bias": torch.ones(4).double()}),
            lambda: module.train().eval(),
        ):
            before = len(calls)
            change()
            module(x)
            assert len(calls) == before + 1
    fresh = make(1, group_size=3)
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x), fresh(x))
    module(x), module(x)
    assert len(calls) >= 7  # with gradients every time
    with torch.inference_mode():
        y = module(x)
    torch.testing.assert_close(module(x), y.clone())
    module.train()(x.requires_grad_()).sum().backward()  # nothing made in inference mode is saved
    assert module.pos.pos_proj.weight.grad.abs().sum() > 0


def test_gradients_of_the_position_bias_are_right():
    module = make(1, group_size=2, interval=2)
    x = tokens(5, 4, batch=1)
    names = ["pos.pos_proj.weight", "pos.pos3.2.bias"]
    values = dict(module.named_parameters())

    def loss(*parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), x).square().mean()

    assert torch.autograd.gradcheck(loss, [values[name].detach().clone().requires_grad_() for name in names], atol=1e-4)


def test_without_position_bias_the_parameters_are_everybodys_and_cosine_similarity_works():
    plain = make(1, dynamic_position_bias=False, group_size=3, interval=2, similarity="cosine")
    assert {name.split(".")[0] for name in plain.state_dict()} == {"qkv", "proj", "logit_scale"}
    assert plain(tokens(7, 8)).isfinite().all()
    assert make(1, dynamic_position_bias=False, group_size=3)(tokens(7)).shape == (2, 7, DIM)


def test_autocast_takes_torch_operators():
    module = make(1, group_size=3, interval=2, dtype=torch.float32)
    x = tokens(7, 8).float()
    with torch.no_grad():
        exact = module(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = module(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"group_size": 0}, ValueError, "group_size must be at least 1, got 0"),
        ({"group_size": (1, 2, 3, 4)}, ValueError, "group_size must be one number, or one per axis"),
        ({"group_size": 2.5}, TypeError, "group_size must be an int, got 2.5"),
        ({"interval": "fixed"}, ValueError, "interval must be one of 'growing', got 'fixed'"),
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        ({"group_size": (3, 3), "interval": (1, 2, 3)}, ValueError, "interval must have as many axes as group_size"),
        ({"small_grids": "never"}, ValueError, "small_grids must be one of 'axes', 'shorter_side'"),
        ({"block_index": -1}, ValueError, "block_index must be at least 0"),
    ],
)
def test_options_that_do_not_fit(options, error, text):
    with pytest.raises(error, match=text):
        LongShortDistanceAttention(DIM, HEADS, **options)


def test_grids_that_do_not_fit():
    with pytest.raises(ValueError, match=r"a 2-dimensional grid, as group_size=\(7, 7\), got grid \(5,\)"):
        make()(tokens(5))
    with pytest.raises(ValueError, match="a 3-dimensional grid"):
        make(group_size=(2, 2, 2))(tokens(5, 5))
