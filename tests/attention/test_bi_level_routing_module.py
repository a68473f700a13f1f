"""The module of bi-level routing: its convolution, its scale, and the authors' ways with uneven grids, written out."""

import pytest
import torch
import torch.nn.functional as F

from coterie.attention import create_attention
from coterie.ops import bi_level_routing_attention

DIM, HEADS = 12, 3


def make(**options):
    torch.manual_seed(0)
    options = {"regions": 3, "top_k": 2, **options}
    return create_attention("bi_level_routing", DIM, HEADS, dtype=torch.float64, **options).eval()


def tokens(*shape):
    return torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written_out(m, x, *, scale, source=None, partition="balanced"):
    batch, rows, columns, _ = x.shape
    q, k, v = m.qkv(x).chunk(3, -1)
    heads = [t.reshape(batch, rows * columns, HEADS, -1).transpose(1, 2) for t in (q, k, v)]
    y = bi_level_routing_attention(
        *heads, (rows, columns), regions=3, top_k=2, scale=scale, partition=partition, backend="reference"
    )
    y = y.transpose(1, 2).reshape(x.shape)
    if source is not None:
        lepe = m.lepe((x if source == "input" else v).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y + lepe
    return m.proj(y)


@pytest.mark.parametrize("source", ["value", "input"])
@pytest.mark.parametrize(("scale", "factor"), [("head", (DIM // HEADS) ** -0.5), ("dim", DIM**-0.5)])
def test_scale_and_what_the_convolution_reads(source, scale, factor):
    m, x = make(lepe=5, lepe_of=source, scale=scale), tokens(2, 6, 9)
    torch.testing.assert_close(m(x), written_out(m, x, scale=factor, source=source))


def test_the_authors_padding_takes_part_and_ours_does_not_exist():
    x = tokens(2, 7, 8)
    ours, padded = make(lepe=5), make(lepe=5, uneven="padded_input")
    scale = (DIM // HEADS) ** -0.5
    torch.testing.assert_close(ours(x), written_out(ours, x, scale=scale, source="value"))
    filled = F.pad(x, (0, 0, 0, 1, 0, 2))  # 9 x 9
    torch.testing.assert_close(padded(x), written_out(padded, filled, scale=scale, source="value")[:, :7, :8])
    refactored = make(lepe=5, uneven="padded_projection")
    torch.testing.assert_close(refactored(x), written_out(refactored, x, scale=scale, source="value", partition="ceil"))
    for one, other in ((ours, padded), (ours, refactored), (padded, refactored)):
        assert not torch.allclose(one(x), other(x), atol=1e-3)
    even = tokens(2, 6, 9)
    torch.testing.assert_close(ours(even), padded(even))
    torch.testing.assert_close(ours(even), refactored(even))


def test_masked_tokens_stay_out_of_the_convolution():
    m, x = make(lepe=5), tokens(2, 7, 8)
    mask = torch.rand(2, 7, 8, generator=torch.Generator().manual_seed(3)) > 0.3
    other = torch.where(mask.unsqueeze(-1), x, x + 100)
    torch.testing.assert_close(m(x, mask=mask)[mask], m(other, mask=mask)[mask])


def test_groups_of_gives_the_regions_of_forward():
    m, x = make(), tokens(1, 6, 6)
    assignment, selected = m.groups_of(x)
    q, k, v = m.project(x)
    allowed = torch.zeros(HEADS, 9, 36, dtype=torch.bool).scatter(2, selected[0], True)
    allowed = allowed.gather(1, assignment[0].unsqueeze(-1).expand(-1, -1, 36))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(m(x), m.proj(y))


@pytest.mark.parametrize("uneven", ["balanced", "padded_input", "padded_projection"])
def test_groups_of_names_only_tokens_that_exist(uneven):
    m, x = make(uneven=uneven), tokens(1, 7, 8)
    assignment, selected = m.groups_of(x)
    assert assignment.shape == (1, HEADS, 56)
    assert 0 <= int(selected.min()) <= int(selected.max()) < 56
    regions = assignment[0, 0][selected[0, 0]]  # all tokens of two regions, and nothing else
    for row, keys in zip(regions, selected[0, 0], strict=True):
        assert row.unique().numel() == 2
        assert torch.equal(keys.unique(), torch.isin(assignment[0, 0], row).nonzero()[:, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 10}, r"top_k must be at most the number of regions, regions x regions = 3 x 3 = 9, got 10"),
        ({"lepe": 4}, "lepe must be odd, or 0 for no convolution, got 4"),
        ({"lepe_of": "key"}, "lepe_of must be one of 'value', 'input', got 'key'"),
        ({"scale": "none"}, "scale must be one of 'head', 'dim', got 'none'"),
        ({"uneven": "crop"}, "uneven must be one of 'balanced', .* got 'crop'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_grid_too_small_for_its_regions():
    with pytest.raises(ValueError, match="grid must have at least regions=3 tokens along each side, got 2 x 5"):
        make()(tokens(1, 2, 5))
