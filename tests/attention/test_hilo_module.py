"""HiLo attention against the authors' figures, against a loop over windows, and what its two groups of heads see."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from coterie.attention import HiLoAttention, create_attention, replace_attention
from coterie.models import create_model
from coterie.testing import generated_tensor, generated_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "litv2"


def hilo(dim=12, heads=3, **options):
    torch.manual_seed(0)
    return HiLoAttention(dim, heads, **options).double().eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(m, x, mask):
    """The definition, one window at a time, for one sample of (*grid, dim)."""
    grid, s, d = x.shape[:-1], m.window_size, m.head_dim
    windows = []
    for corner in itertools.product(*(range(0, n, s) for n in grid)):
        inside = itertools.product(*(range(c, min(c + s, n)) for c, n in zip(corner, grid)))
        windows.append(list(inside))
    out = x.new_zeros(*grid, m.dim)

    def attend(q, k, v, head):
        if m.similarity == "cosine":
            logits = F.normalize(q, dim=0) @ F.normalize(k, dim=1).T * m.logit_scale[head].exp()[0]
        else:
            logits = q @ k.T * d**-0.5
        return logits.softmax(-1) @ v

    means = [torch.stack([x[p] for p in w if mask[p]]).mean(0) for w in windows if any(mask[p] for p in w)]
    for window in windows:
        real = [p for p in window if mask[p]]
        for place in window:
            parts = []
            for head in range(m.hi_heads):
                q = m.h_qkv(x[place]).view(3, m.hi_heads, d)[0, head]
                if real:
                    kv = torch.stack([m.h_qkv(x[p]).view(3, m.hi_heads, d)[1:, head] for p in real])
                    parts.append(attend(q, kv[:, 0], kv[:, 1], head))
                else:
                    parts.append(torch.zeros_like(q))
            hi = m.h_proj(torch.cat(parts)) if parts else x.new_zeros(0)
            parts = []
            for head in range(m.lo_heads):
                q = m.l_q(x[place]).view(m.lo_heads, d)[head]
                kv = torch.stack([m.l_kv(mean).view(2, m.lo_heads, d)[:, head] for mean in means])
                parts.append(attend(q, kv[:, 0], kv[:, 1], m.hi_heads + head))
            lo = m.l_proj(torch.cat(parts)) if parts else x.new_zeros(0)
            out[place] = torch.cat([hi, lo])
    return out


@pytest.mark.parametrize(
    ("case", "uneven"), [("hilo_6x10", "smaller"), ("hilo_6x10", "zeros"), ("hilo_dense_7x9", "zeros")]
)
def test_it_equals_the_authors(case, uneven):
    figures = json.loads((GOLDEN / f"{case}.json").read_text())
    m = HiLoAttention(
        figures["dim"], figures["num_heads"], alpha=figures["alpha"], window_size=figures["window_size"], uneven=uneven
    ).double()
    m.load_state_dict(generated_weights(figures["shapes"].items(), figures["seed"]), strict=True)
    rows, columns = figures["grid"]
    x = generated_tensor("tokens", (2, rows * columns, figures["dim"]), figures["seed"]) * 8
    y = m(x.unflatten(1, (rows, columns)))
    expected = figures["output"]
    assert list(y.shape) == expected["shape"]
    torch.testing.assert_close(y.flatten()[expected["places"]].tolist(), expected["values"], rtol=1e-11, atol=1e-12)
    assert float(y.mean()) == pytest.approx(expected["mean"], rel=1e-10)
    assert float(y.std()) == pytest.approx(expected["std"], rel=1e-10)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((5, 7), {"window_size": 2, "alpha": 0.5}),
        ((5, 7), {"window_size": 3, "alpha": 0.5, "similarity": "cosine"}),
        ((4, 6), {"window_size": 2, "alpha": 0.7}),
        ((3, 3), {"window_size": 5, "alpha": 0.4}),
        ((3, 4), {"window_size": 2, "alpha": 0.0}),
        ((3, 5), {"window_size": 2, "alpha": 1.0}),
        ((3, 2, 5), {"window_size": 2, "alpha": 0.5}),
    ],
)
def test_it_is_what_a_loop_over_windows_gives(grid, options):
    m, x = hilo(**options), tokens(2, *grid, 12)
    mask = torch.rand(2, *grid, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[:, *(slice(0, 2) for _ in grid)] = False  # a whole window of padding
    mask[:, *(-1 for _ in grid)] = True
    with torch.no_grad():
        for chosen in (mask, torch.ones_like(mask)):
            y = m(x, mask=chosen)
            for one in range(2):
                expected = by_hand(m, x[one], chosen[one])
                torch.testing.assert_close(y[one][chosen[one]], expected[chosen[one]])
        torch.testing.assert_close(m(x), m(x, mask=torch.ones_like(mask)))


def test_padding_of_a_smaller_grid_takes_no_part_and_zeros_do_by_the_authors_way():
    m, theirs = hilo(alpha=0.5), hilo(alpha=0.5, uneven="zeros")
    x = tokens(1, 5, 7, 12)
    larger = 50 * tokens(1, 8, 9, 12, seed=2)
    larger[:, :5, :7] = x
    mask = torch.zeros(1, 8, 9, dtype=torch.bool)
    mask[:, :5, :7] = True
    torch.testing.assert_close(m(larger, mask=mask)[:, :5, :7], m(x))
    filled = m(F.pad(x, (0, 0, 0, 1, 0, 1)))[:, :5, :7]  # zeros as tokens
    torch.testing.assert_close(theirs(x), filled)
    torch.testing.assert_close(theirs(x, mask=torch.ones(1, 5, 7, dtype=torch.bool)), filled)
    assert (theirs(x) - m(x)).abs().max() > 1e-3
    assert torch.equal(theirs(x[:, :4, :6]), m(x[:, :4, :6]))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_windows_of_one_token_are_ordinary_attention(alpha):
    m, x = hilo(alpha=alpha, window_size=1), tokens(2, 3, 5, 12)
    assert (m.hi_heads, m.lo_heads) == (0, 3)
    plain = create_attention("global", 12, 3, dtype=torch.float64)
    plain.qkv.weight = torch.nn.Parameter(torch.cat([m.l_q.weight, m.l_kv.weight]))
    plain.qkv.bias = torch.nn.Parameter(torch.cat([m.l_q.bias, m.l_kv.bias]))
    plain.proj = m.l_proj
    torch.testing.assert_close(m(x), plain(x))


def test_what_each_group_of_heads_sees():
    m, x = hilo(alpha=0.5, window_size=2), tokens(1, 6, 6, 12)
    hi = m.hi_heads * m.head_dim
    changed = x.clone()
    changed[0, 2:4, 4:6] += 1
    moved = ((m(changed) - m(x)).abs() > 1e-9)[0]
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[2:4, 4:6] = True
    assert torch.equal(moved[..., :hi].any(-1), inside)
    assert moved[..., hi:].any(-1).all()
    swapped = x.clone()
    swapped[0, 0, 0], swapped[0, 1, 1] = x[0, 1, 1], x[0, 0, 0]  # within a window: the averages stay
    torch.testing.assert_close(m(swapped)[0, 2:, 2:], m(x)[0, 2:, 2:])
    constant = m(x[:, :1, :1].expand(1, 6, 6, 12))
    torch.testing.assert_close(constant, constant[:, :1, :1].expand_as(constant))


@pytest.mark.parametrize(("heads", "alpha", "lo"), [(12, 0.9, 10), (16, 0.9, 14), (12, 0.5, 6), (3, 0.3, 0), (4, 1, 4)])
def test_the_split_of_heads_rounds_down_and_an_empty_group_has_no_parameters(heads, alpha, lo):
    m = HiLoAttention(heads * 2, heads, alpha=alpha, device="meta")
    assert (m.lo_heads, m.hi_heads) == (lo, heads - lo)
    dim, low, high = heads * 2, 2 * lo, 2 * (heads - lo)
    shapes = {
        "l_q": (low, dim),
        "l_kv": (2 * low, dim),
        "l_proj": (low, low),
        "h_qkv": (3 * high, dim),
        "h_proj": (high, high),
    }
    expected = {name: shape for name, shape in shapes.items() if shape[0]}
    assert {
        n.removesuffix(".weight"): tuple(p.shape) for n, p in m.named_parameters() if n.endswith("weight")
    } == expected
    assert {n.removesuffix(".bias") for n, _ in m.named_parameters() if n.endswith("bias")} == set(expected)
    without = HiLoAttention(dim, heads, alpha=alpha, qkv_bias=False)
    assert {n for n, _ in without.named_parameters() if n.endswith("bias")} <= {"l_proj.bias", "h_proj.bias"}


def test_multiply_adds_are_those_of_the_authors_readme():
    m = HiLoAttention(384, 12, alpha=0.5, device="meta")
    with FlopCounterMode(display=False) as counter:
        m(torch.empty(1, 14, 14, 384, device="meta"))
    assert counter.get_total_flops() / 2 == 83_467_776


def test_bad_options():
    for options, error, text in [
        ({"alpha": 1.5}, ValueError, r"alpha must be from 0 \(all heads Hi-Fi\) to 1 \(all Lo-Fi\), got 1.5"),
        ({"alpha": "half"}, TypeError, "alpha must be a number, got 'half'"),
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"window_size": 2.0}, TypeError, "window_size must be an int"),
        ({"uneven": "crop"}, ValueError, "uneven must be one of 'smaller', 'zeros', got 'crop'"),
    ]:
        with pytest.raises(error, match=text):
            create_attention("hilo", 12, 3, **options)


def test_a_pyramid_uses_it_with_fewer_parameters_and_a_sequence_does_not():
    options = [{"window_size": s} for s in (2, 2, 1, 1)]
    ours = create_model("dgt_pico", attention="hilo", attention_options=options, num_classes=4).eval()
    assert ours(torch.randn(2, 3, 32, 32)).shape == (2, 4)
    shared = create_model("dgt_pico", attention="global", num_classes=4, device="meta")
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in shared.parameters())
    vit = create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    report = replace_attention(vit, "hilo")
    assert report.swapped == []
    assert "'hilo' works on 2 or 3-dimensional grids" in report.skipped["blocks.0.attn"]
