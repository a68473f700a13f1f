"""Shifted and cross-shaped windows against a brute-force mask of window membership, in float64, on odd grids too."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from coterie.attention import CrossShapedWindowAttention, GlobalAttention, ShiftedWindowAttention, _windows
from coterie.ops._dispatch import Call
from coterie.ops.biased_group_attention import BIASED_GROUP_ATTENTION
from coterie.testing import generated_tensor, generated_weights


@pytest.fixture(params=["groups", "cut out"])
def way(request, monkeypatch):
    """Windows as groups of queries for the CPU's kernel, or cut out of the grid as on other devices."""
    monkeypatch.setattr(_windows, "_grouped_is_faster", lambda *_: request.param == "groups")
    return request.param


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(m, x, same, mask=None, bias=None):
    """Softmax attention where `same` (heads or 1, tokens, tokens) says who shares a window."""
    query, key, value = m.project(x)
    query, scale = m.scaled(query)
    scores = scale * query @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    allowed = same.expand(scores.shape)
    if mask is not None:
        allowed = allowed & mask.flatten(1)[:, None, None]
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    return m.proj((weights @ value).transpose(1, 2).reshape(x.shape)), value


def together(grid, number):
    """(tokens, tokens) bool: pairs of grid positions with the same window number."""
    numbers = [number(*place) for place in itertools.product(*map(range, grid))]
    return torch.tensor([[a == b for b in numbers] for a in numbers])


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("block_index", [0, 1])
@pytest.mark.parametrize(
    ("grid", "window"),
    [((8, 8), 4), ((7, 10), 4), ((5, 3), 4), ((9,), 4), ((3, 5, 4), 2), ((6, 7), (2, 3)), ((1, 1), 7)],
)
@pytest.mark.usefixtures("way")
def test_shifted_windows_are_the_brute_force_ones(grid, window, block_index, similarity):
    torch.manual_seed(0)
    m = ShiftedWindowAttention(8, 2, window_size=window, block_index=block_index, similarity=similarity).double()
    sizes = window if isinstance(window, tuple) else (window,) * len(grid)
    shift = [w // 2 if block_index % 2 and w < g else 0 for w, g in zip(sizes, grid, strict=True)]
    same = together(grid, lambda *place: tuple((i - s) // w for i, s, w in zip(place, shift, sizes, strict=True)))
    x = tokens(2, *grid, 8)
    torch.testing.assert_close(m(x), dense(m, x, same)[0])
    mask = torch.rand(2, *grid, generator=torch.Generator().manual_seed(2)) > 0.4
    torch.testing.assert_close(m(x, mask=mask), dense(m, x, same, mask)[0])


@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 9)])
@pytest.mark.parametrize("stripe_width", [1, 3])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.usefixtures("way")
def test_cross_shaped_windows_are_the_brute_force_ones(grid, stripe_width, heads):
    torch.manual_seed(0)
    m = CrossShapedWindowAttention(12, heads, stripe_width=stripe_width).double()
    rows = together(grid, lambda i, j: i // stripe_width)
    columns = together(grid, lambda i, j: j // stripe_width)
    across = (heads + 1) // 2
    same = torch.stack([rows if head < across else columns for head in range(heads)])
    x = tokens(2, *grid, 12)
    torch.testing.assert_close(m(x), dense(m, x, same)[0])
    mask = torch.rand(2, *grid, generator=torch.Generator().manual_seed(2)) > 0.4
    torch.testing.assert_close(m(x, mask=mask), dense(m, x, same, mask)[0])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_index", [0, 1])
@pytest.mark.parametrize(
    ("grid", "window"), [((7, 10), 4), ((3, 3), 4), ((8, 8), 4), ((5,), 3), ((3, 4, 5), (2, 4, 3))]
)
def test_padding_of_the_input_takes_part_on_demand(grid, window, block_index, masked):
    """The authors' way: as on a larger grid whose further tokens are zeros and real."""
    torch.manual_seed(0)
    options = {"window_size": window, "block_index": block_index}
    m = ShiftedWindowAttention(8, 2, uneven="padded_input", **options).double()
    plain = ShiftedWindowAttention(8, 2, **options).double()
    plain.load_state_dict(m.state_dict())
    sizes = window if isinstance(window, tuple) else (window,) * len(grid)
    larger = [-(-n // w) * w for n, w in zip(grid, sizes, strict=True)]
    inside = tuple(slice(0, n) for n in grid)
    x = tokens(2, *grid, 8)
    padded = x.new_zeros(2, *larger, 8)
    padded[:, *inside] = x
    mask = wide = None
    if masked:
        mask = torch.rand(2, *grid, generator=torch.Generator().manual_seed(2)) > 0.4
        wide = torch.ones(2, *larger, dtype=torch.bool)
        wide[:, *inside] = mask
    torch.testing.assert_close(m(x, mask=mask), plain(padded, mask=wide)[:, *inside])
    assert torch.allclose(m(x), plain(x)) == (tuple(larger) == grid)


def test_windows_as_groups_have_the_gradients_of_windows_cut_out(monkeypatch):
    gradients = []
    for grouped in (True, False):
        monkeypatch.setattr(_windows, "_grouped_is_faster", lambda *_, grouped=grouped: grouped)
        torch.manual_seed(0)
        m = ShiftedWindowAttention(8, 2, window_size=3, block_index=1).double()
        x = tokens(2, 7, 8, 8).requires_grad_()
        (m(x) * tokens(2, 7, 8, 8, seed=3)).sum().backward()
        gradients.append([x.grad, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_index", [0, 1])
def test_windows_with_a_bias_by_the_kernel_are_windows_cut_out(monkeypatch, block_index, masked):
    m = ShiftedWindowAttention(8, 2, window_size=3, block_index=block_index, relative_position_bias=True).double()
    mask = torch.rand(2, 7, 8, generator=torch.Generator().manual_seed(2)) > 0.3 if masked else None
    asked, found = [], []
    kernel_serves = ShiftedWindowAttention._kernel_serves
    for way in (lambda *call: asked.append(kernel_serves(*call)) or asked[-1], lambda *_: False):
        monkeypatch.setattr(ShiftedWindowAttention, "_kernel_serves", way)
        m.zero_grad()
        x = tokens(2, 7, 8, 8).requires_grad_()
        y = m(x, mask=mask)
        (y * tokens(*y.shape, seed=3)).sum().backward()
        found.append([y, x.grad, *(parameter.grad for parameter in m.parameters())])
    assert asked == [BIASED_GROUP_ATTENTION.explain(Call("cpu", torch.float64, 4)).chosen == "cpu"]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_davits_windows_are_those_of_the_authors_code():
    """A grid of 9 x 12 in windows of 7: their padding takes part."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "davit" / "window.json").read_text())
    m = ShiftedWindowAttention(8, golden["heads"], window_size=7, uneven="padded_input").double()
    m.load_state_dict(generated_weights(golden["shapes"].items(), golden["seed"]))
    x = generated_tensor("x", (1, *golden["grid"], 8), golden["seed"])
    expected = torch.tensor(golden["output"], dtype=torch.float64)
    torch.testing.assert_close(m(x).flatten(0, 2), expected, rtol=1e-10, atol=1e-11)
    m.uneven = "masked"
    assert not torch.allclose(m(x).flatten(0, 2), expected)


def test_a_single_head_alternates_between_rows_and_columns():
    x = tokens(1, 4, 5, 8)
    even, odd = (CrossShapedWindowAttention(8, 1, stripe_width=1, block_index=i).double() for i in (0, 1))
    odd.load_state_dict(even.state_dict())
    torch.testing.assert_close(even(x), odd(x.transpose(1, 2)).transpose(1, 2))


def test_windows_as_large_as_the_grid_are_global_attention():
    x = tokens(2, 5, 6, 8)
    exact = GlobalAttention(8, 2).double()
    for m in (
        ShiftedWindowAttention(8, 2, window_size=9, block_index=1).double(),
        CrossShapedWindowAttention(8, 2, stripe_width=9).double(),
    ):
        m.load_state_dict(exact.state_dict())
        torch.testing.assert_close(m(x), exact(x))


@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 9)])
@pytest.mark.parametrize("block_index", [0, 1])
def test_relative_position_bias_depends_on_the_offset_only(grid, block_index):
    torch.manual_seed(0)
    m = ShiftedWindowAttention(8, 2, window_size=4, block_index=block_index, relative_position_bias=True).double()
    assert m.relative_position_bias_table.shape == (49, 2)
    assert "relative_position_bias_table" in m.no_weight_decay()
    places = list(itertools.product(*map(range, grid)))
    shift = [2 if block_index and g > 4 else 0 for g in grid]
    same = together(grid, lambda *place: tuple((i - s) // 4 for i, s in zip(place, shift, strict=True)))
    bias = torch.zeros(2, len(places), len(places), dtype=torch.float64)
    for (a, p), (b, q) in itertools.product(enumerate(places), repeat=2):
        if same[a, b]:
            bias[:, a, b] = m.relative_position_bias_table[(p[0] - q[0] + 3) * 7 + p[1] - q[1] + 3]
    x = tokens(2, *grid, 8)
    torch.testing.assert_close(m(x), dense(m, x, same, bias=bias.detach())[0])
    m(x).sum().backward()
    assert m.relative_position_bias_table.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="2-dimensional grid"):
        m(tokens(2, 9, 8))


@pytest.mark.parametrize("dims", [1, 3])
def test_relative_position_bias_on_other_grids(dims):
    m = ShiftedWindowAttention(8, 2, window_size=(3, 2, 4)[:dims], relative_position_bias=True, block_index=1).double()
    assert m(tokens(2, *(7, 5, 6)[:dims], 8)).isfinite().all()


@pytest.mark.parametrize("grid", [(6, 6), (7, 5)])
def test_lepe_is_a_convolution_inside_each_stripe(grid):
    torch.manual_seed(0)
    m = CrossShapedWindowAttention(8, 2, stripe_width=2, lepe=True).double()
    x = tokens(2, *grid, 8)
    rows, columns = (together(grid, number) for number in (lambda i, j: i // 2, lambda i, j: j // 2))
    _, value = dense(m, x, torch.stack([rows, columns]))
    places = list(itertools.product(*map(range, grid)))
    extra = m.lepe.bias.view(2, 4)[None, :, None].repeat(2, 1, len(places), 1)
    for (a, p), (b, q) in itertools.product(enumerate(places), repeat=2):
        if abs(p[0] - q[0]) <= 1 and abs(p[1] - q[1]) <= 1:
            tap = m.lepe.weight[:, 0, q[0] - p[0] + 1, q[1] - p[1] + 1].view(2, 4)
            for head, same in enumerate((rows, columns)):
                if same[a, b]:
                    extra[:, head, a] = extra[:, head, a] + tap[head] * value[:, head, b]
    expected = _without(m, x) + extra.transpose(1, 2).reshape(x.shape) @ m.proj.weight.T
    torch.testing.assert_close(m(x), expected)
    mask = torch.ones(2, *grid, dtype=torch.bool)
    mask[:, -1] = False
    changed = x.clone()
    changed[:, -1] += 5.0
    torch.testing.assert_close(m(x, mask=mask)[:, :-1], m(changed, mask=mask)[:, :-1])


def _without(m, x):
    lepe, m.lepe = m.lepe, None
    y = m(x)
    m.lepe = lepe
    return y


@pytest.mark.parametrize(
    ("cls", "options", "text"),
    [
        (ShiftedWindowAttention, {"window_size": 0}, "window_size must be at least 1"),
        (ShiftedWindowAttention, {"window_size": (2, 2, 2, 2)}, "window_size must be one number, or one per axis"),
        (ShiftedWindowAttention, {"window_size": 4, "shift_size": 4}, "shift_size must be smaller than window_size"),
        (ShiftedWindowAttention, {"window_size": (4, 4), "shift_size": (1, 1, 1)}, "shift_size must have as many axes"),
        (ShiftedWindowAttention, {"uneven": "cut"}, "uneven must be one of 'masked', 'padded_input', got 'cut'"),
        (ShiftedWindowAttention, {"block_index": -1}, "block_index must be at least 0"),
        (CrossShapedWindowAttention, {"stripe_width": 0}, "stripe_width must be at least 1"),
        (CrossShapedWindowAttention, {"block_index": -1}, "block_index must be at least 0"),
    ],
)
def test_bad_options(cls, options, text):
    with pytest.raises(ValueError, match=text):
        cls(8, 2, **options)


def test_windows_of_two_axes_refuse_other_grids():
    m = ShiftedWindowAttention(8, 2, window_size=(2, 3)).double()
    with pytest.raises(ValueError, match=r"2-dimensional grid, as window_size=\(2, 3\)"):
        m(tokens(1, 9, 8))
    explicit = ShiftedWindowAttention(8, 2, window_size=4, shift_size=(1, 2), block_index=1).double()
    assert explicit(tokens(1, 6, 6, 8)).shape == (1, 6, 6, 8)
