"""Bi-level routing attention against brute force: loops over regions in float64, and a dense boolean mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.ops import bi_level_routing_attention, explain, region_routing

BACKENDS = ("reference", "native", "cpu")


def tensors(batch, heads, tokens, head_dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, tokens, head_dim, generator=generator, dtype=torch.float64).to(dtype) for _ in "qkv"
    ]


def regions_of(grid, regions, mask=None):
    """Region of each token: row r of H belongs to region floor(r S / H), and columns likewise; H is up to the last row
    that holds a real token."""
    rows, columns = grid
    if mask is not None and mask.any():
        real = mask.view(grid).nonzero()
        rows, columns = (int(n) + 1 for n in real.amax(0))
    return torch.tensor(
        [
            min(r * regions // rows, regions - 1) * regions + min(c * regions // columns, regions - 1)
            for r in range(grid[0])
            for c in range(grid[1])
        ]
    )


def brute_force(query, key, value, grid, regions, top_k, mask=None, scale=None):
    batch, heads, tokens, head_dim = query.shape
    scale = head_dim**-0.5 if scale is None else scale
    members = [regions_of(grid, regions, None if mask is None else mask[b]) for b in range(batch)]
    mask = torch.ones(batch, tokens, dtype=torch.bool) if mask is None else mask
    out = 0.0 * (query.sum() + key.sum() + value)  # differentiable where every key is masked, too
    for b in range(batch):
        affinity = torch.full((regions**2, regions**2), float("-inf"), dtype=query.dtype)
        mean = torch.zeros(2, regions**2, heads * head_dim, dtype=query.dtype)
        member = members[b]
        real = [(member == r) & mask[b] for r in range(regions**2)]
        for r in range(regions**2):
            for i, x in enumerate((query, key)):
                mean[i, r] = x[b, :, real[r]].transpose(0, 1).flatten(1).mean(0) if real[r].any() else 0.0
        for s in range(regions**2):
            if real[s].any():
                affinity[:, s] = mean[0] @ mean[1, s]
        for r in range(regions**2):
            chosen = affinity[r].sort(descending=True, stable=True).indices[:top_k]
            keys = torch.isin(member, chosen) & mask[b]
            if keys.any():
                here = member == r
                weight = (scale * query[b, :, here] @ key[b, :, keys].transpose(-1, -2)).softmax(-1)
                out[b, :, here] = weight @ value[b, :, keys]
    return out


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_every_backend_equals_brute_force_in_output_and_gradients(data):
    regions = data.draw(st.integers(1, 3))
    grid = (data.draw(st.integers(regions, 7)), data.draw(st.integers(regions, 7)))
    top_k = data.draw(st.integers(1, regions**2))
    sizes = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 3)),
        grid[0] * grid[1],
        data.draw(st.integers(1, 9)),
    )
    seed = data.draw(st.integers(0, 9))
    mask = None
    if data.draw(st.booleans()):
        mask = torch.rand(sizes[0], sizes[2], generator=torch.Generator().manual_seed(seed)) > data.draw(
            st.sampled_from([0.3, 0.8])
        )
    inputs = [x.requires_grad_() for x in tensors(*sizes, seed=seed)]
    slope = tensors(*sizes, seed=seed + 1)[0]
    expected = brute_force(*inputs, grid, regions, top_k, mask)
    expected_gradients = torch.autograd.grad(expected, inputs, slope, allow_unused=True)
    for backend in BACKENDS:
        y = bi_level_routing_attention(*inputs, grid, regions=regions, top_k=top_k, key_mask=mask, backend=backend)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10, msg=lambda m, b=backend: f"{b}: {m}")
        gradients = torch.autograd.grad(y, inputs, slope)
        for got, want in zip(gradients, expected_gradients):
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", [(8, 8), (9, 13), (4, 5)])
def test_regions_partition_the_grid_and_differ_by_one_row_or_column(grid):
    q, k, _ = tensors(1, 2, grid[0] * grid[1], 4)
    assignment, selected = region_routing(q, k, grid, regions=4, top_k=16)
    assert torch.equal(assignment[0, 0], regions_of(grid, 4))
    for row in selected[0, 0]:
        assert torch.equal(row[row < grid[0] * grid[1]].sort().values, torch.arange(grid[0] * grid[1]))
        assert row.unique().numel() == row.numel()
    sides = torch.bincount(assignment[0, 0]).view(4, 4)
    assert int(sides.max()) <= -(-grid[0] // 4) * -(-grid[1] // 4)
    assert int(sides.min()) == (grid[0] // 4) * (grid[1] // 4)


def test_all_regions_are_exact_attention_and_own_region_is_window_attention():
    q, k, v = tensors(2, 2, 36, 8)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(bi_level_routing_attention(q, k, v, (6, 6), regions=3, top_k=9), exact)
    member = regions_of((6, 6), 3)
    own = torch.nn.functional.one_hot(member, 9).double() @ torch.randn(9, 9, dtype=torch.float64).mul(0.01)
    direction = torch.nn.functional.one_hot(member, 9).double() * 100.0 + own  # regions are nearest to themselves
    q, k = (torch.cat([x[..., :0], direction.expand(2, 2, 36, 9)], -1) for x in (q, k))
    window = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=member[:, None] == member)
    torch.testing.assert_close(bi_level_routing_attention(q, k, v, (6, 6), regions=3, top_k=1), window)


def test_the_order_of_heads_and_permutations_inside_regions_change_no_choice():
    q, k, _ = tensors(1, 3, 36, 4)
    _, selected = region_routing(q, k, (6, 6), regions=3, top_k=2)
    assert torch.equal(selected[:, 0], selected[:, 2])  # one choice for all heads
    _, flipped = region_routing(q.flip(1), k.flip(1), (6, 6), regions=3, top_k=2)
    assert torch.equal(selected, flipped)


def test_ties_go_to_the_lower_region():
    same = torch.ones(1, 1, 36, 4)
    _, selected = region_routing(same, same, (6, 6), regions=3, top_k=2)
    assert torch.equal(selected[0, 0, 5].sort().values, torch.tensor([0, 1, 2, 3, 6, 7, 8, 9]))


def test_the_choice_has_no_gradient_and_half_precision_chooses_as_float32():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 64, 8, dtype=torch.bfloat16))
    _, selected = region_routing(q, k, (8, 8), regions=4, top_k=3)
    assert not selected.is_floating_point()
    assert torch.equal(selected, region_routing(q.float(), k.float(), (8, 8), regions=4, top_k=3)[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selected, region_routing(q.float(), k.float(), (8, 8), regions=4, top_k=3)[1])
    y = bi_level_routing_attention(q, k, v, (8, 8), regions=4, top_k=3)
    assert y.dtype == torch.bfloat16
    expected = bi_level_routing_attention(*(x.double() for x in (q, k, v)), (8, 8), regions=4, top_k=3)
    assert (y.double() - expected).norm() < 0.02 * expected.norm()


def test_the_authors_other_partition_pads_with_keys_of_zero():
    """Regions of side // S, the last partly outside; zeros outside are keys with a score of zero."""
    grid, regions, top_k = (7, 5), 3, 4
    q, k, v = tensors(2, 2, 35, 4)
    y = bi_level_routing_attention(q, k, v, grid, regions=regions, top_k=top_k, partition="ceil")
    height, width = 7 // 3, 5 // 3
    down, across = -(-7 // height), -(-5 // width)
    pad = (0, 0, 0, across * width - 5, 0, down * height - 7)
    padded = [torch.nn.functional.pad(x.unflatten(2, grid), pad) for x in (q, k, v)]
    cut = [
        x.unflatten(3, (across, width)).unflatten(2, (down, height)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        for x in padded
    ]
    ones = torch.nn.functional.pad(torch.ones(1, 1, *grid, 1, dtype=q.dtype), pad)
    count = (
        ones.unflatten(3, (across, width))
        .unflatten(2, (down, height))
        .transpose(3, 4)
        .flatten(4, 5)
        .flatten(2, 3)
        .sum(3)
    )
    mean = [(x.sum(3) / count).transpose(1, 2).flatten(2) for x in cut[:2]]
    chosen = (mean[0] @ mean[1].transpose(1, 2)).topk(top_k).indices
    for b in range(2):
        for region in range(down * across):
            keys, values = (cut[i][b, :, chosen[b, region]].flatten(1, 2) for i in (1, 2))
            want = (cut[0][b, :, region] @ keys.transpose(-1, -2) / 2).softmax(-1) @ values
            top, left = region // across * height, region % across * width
            for t in range(height * width):
                r, c = top + t // width, left + t % width
                if r < 7 and c < 5:
                    torch.testing.assert_close(y[b, :, r * 5 + c], want[:, t])


def test_the_backward_is_the_same_bits_every_time_with_deterministic_algorithms_on():
    inputs = [x.requires_grad_() for x in tensors(1, 2, 18 * 18, 8, dtype=torch.float32)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = [
            torch.autograd.grad(
                bi_level_routing_attention(*inputs, (18, 18), regions=6, top_k=5).square().sum(), inputs
            )
            for _ in range(3)
        ]
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("size", [(5, 4), (7, 9), (2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_in_a_larger_batch_is_cut_as_it_would_be_alone(size, backend):
    """(2, 3) has fewer rows than regions: some regions are empty, and no key is lost."""
    q, k, v = tensors(2, 2, 7 * 9, 4)
    mask = torch.zeros(2, 7, 9, dtype=torch.bool)
    mask[0, : size[0], : size[1]] = True
    mask[1] = True
    y = bi_level_routing_attention(q, k, v, (7, 9), regions=3, top_k=2, key_mask=mask.flatten(1), backend=backend)
    first = [x.unflatten(2, (7, 9))[:1, :, : size[0], : size[1]].flatten(2, 3) for x in (q, k, v)]
    got = y[:1].unflatten(2, (7, 9))[:, :, : size[0], : size[1]].flatten(2, 3)
    torch.testing.assert_close(got, brute_force(*first, size, 3, 2), rtol=1e-10, atol=1e-10)
    second = [x[1:] for x in (q, k, v)]
    alone = bi_level_routing_attention(*second, (7, 9), regions=3, top_k=2, backend=backend)
    torch.testing.assert_close(y[1:], alone, rtol=1e-10, atol=1e-10)


def test_explain_knows_it():
    q, k, v = tensors(1, 1, 16, 4)
    told = explain("bi_level_routing_attention", q, k, v, (4, 4))
    assert told.operation == "bi_level_routing_attention"
    assert "reference" in dict(told.reasons)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"regions": 7}, ValueError, "grid must have at least regions=7 tokens along each side, got 4 x 5"),
        (
            {"top_k": 5},
            ValueError,
            r"top_k must be at most the number of regions, regions x regions = 2 x 2 = 4, got 5",
        ),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"regions": 2.0}, TypeError, "regions must be an int, got float"),
        ({"grid": (4, 4)}, ValueError, r"grid must be \(rows, columns\) of 20 tokens, got \(4, 4\)"),
        ({"partition": "round"}, ValueError, "partition must be one of 'balanced', 'ceil', got 'round'"),
        ({"scale": -1}, ValueError, "scale must be positive"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"key_mask": torch.ones(1, 19, dtype=torch.bool)}, ValueError, "key_mask must have shape"),
    ],
)
def test_bad_arguments(arguments, error, message):
    q, k, v = tensors(1, 2, 20, 4)
    grid = arguments.pop("grid", (4, 5))
    with pytest.raises(error, match=message):
        bi_level_routing_attention(q, k, v, grid, **{"regions": 2, "top_k": 1, **arguments})
