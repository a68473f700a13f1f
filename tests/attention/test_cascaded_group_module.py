"""Cascaded group attention: equal to timm's on shared weights, in inference and training, with either padding."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.efficientvit_msra import LocalWindowAttention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coterie.attention import CascadedGroupAttention
from coterie.ops.cascaded_group import cascaded_group_attention
from coterie.testing import generated_tensor, generated_weights


def weighted(m, seed=1):
    """The module in float64, with weights made from names and shapes, and running statistics that do something."""
    m = m.double()
    state = generated_weights(((n, t.shape) for n, t in m.state_dict().items() if t.is_floating_point()), seed)
    state = {n: 1 + t.abs() if n.endswith("running_var") else t for n, t in state.items()}
    m.load_state_dict(state, strict=False)
    return m


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(dim=48, heads=3, kernels=(7, 5, 3, 3), window=7, uneven="padded_input"):
    theirs = weighted(
        LocalWindowAttention(dim, 16, heads, attn_ratio=dim / heads / 16, resolution=window, kernels=kernels)
    )
    ours = CascadedGroupAttention(dim, heads, kernels=kernels, window_size=window, uneven=uneven).double()
    ours.load_state_dict(theirs.attn.state_dict())
    return theirs, ours


def of_map(m, x):
    return m(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("grid", "window"), [((14, 14), 7), ((7, 7), 7), ((4, 4), 4), ((9, 16), 7), ((3, 5), 4), ((1, 1), 4)]
)
def test_it_is_timms_module(grid, window, train):
    theirs, ours = pair(window=window)
    theirs.train(train)
    ours.train(train)
    x = tokens(2, *grid, 48)
    torch.testing.assert_close(ours(x), of_map(theirs, x), rtol=1e-12, atol=1e-12)
    for name, value in theirs.attn.state_dict().items():  # running statistics, which padding enters as there
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["windows", "small"])
def test_it_gives_the_figures_of_the_authors_code(name):
    """A map of 9 x 9 in windows of 7, whose padding takes part there, and one of 4 x 4."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "efficientvit" / f"{name}.json").read_text())
    side, dim = golden["side"], len(golden["output"])
    options = {"kernels": (7, 5, 3, 3), "window_size": min(7, side), "uneven": "padded_input"}
    m = CascadedGroupAttention(dim, golden["heads"], **options).double().eval()
    weights = generated_weights(golden["shapes"].items(), golden["seed"])
    weights = {
        n.replace(".c.", ".conv."): t.abs() + 0.5 if n.endswith("running_var") else t for n, t in weights.items()
    }
    m.load_state_dict(weights, strict=False)
    assert {n for n, t in m.state_dict().items() if t.is_floating_point()} == set(weights)
    x = generated_tensor("x", (1, dim, side, side), golden["seed"]).permute(0, 2, 3, 1)
    y = m(x)[0].permute(2, 0, 1).flatten(1)[:, :: golden["every"]]
    torch.testing.assert_close(y, torch.tensor(golden["output"], dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_timms(train):
    theirs, ours = (m.train(train) for m in pair(dim=32, heads=2, window=4))
    gradients = []
    for m, call in ((theirs.attn, lambda x: of_map(theirs, x)), (ours, ours)):
        x = tokens(2, 6, 8, 32).requires_grad_()
        (call(x) * tokens(2, 6, 8, 32, seed=3)).sum().backward()
        gradients.append({"x": x.grad, **{n: p.grad for n, p in m.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kernels", [(7, 5, 3), 5])
def test_the_kernel_gives_what_torch_gives(kernels):
    _, m = pair(kernels=kernels if isinstance(kernels, tuple) else (kernels,) * 3)
    m.eval().float()
    x = tokens(2, 9, 12, 48).float()
    mask = torch.rand(2, 9, 12, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[1, :, :7] = False  # windows without a real token
    as_map = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for uneven in ("masked", "padded_input"):
        m.uneven = uneven
        for real in (None, mask):
            with torch.no_grad():
                m.backend = "cpu"
                fast, of_a_map = m(x, mask=real), m(as_map, mask=real)
                m.backend = "reference"
                expected = m(x, mask=real)
            some = torch.ones_like(mask) if real is None else real
            torch.testing.assert_close(fast[some], expected[some], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(of_a_map[some], expected[some], rtol=1e-4, atol=1e-4)
    assert of_a_map.permute(0, 3, 1, 2).is_contiguous()


@pytest.mark.parametrize("train", [False, True])
def test_padding_takes_no_part(train):
    """Smaller windows at the border: the parts of the grid computed alone, and a mask the same as no padding."""
    m = weighted(CascadedGroupAttention(12, 3, key_dim=4, window_size=4)).train(train)
    x, mask = tokens(1, 6, 7, 12), torch.zeros(1, 9, 8, dtype=torch.bool)
    mask[:, :6, :7] = True
    padded = F.pad(x, (0, 0, 0, 1, 0, 3), value=3.0)
    torch.testing.assert_close(m(padded, mask=mask)[:, :6, :7], m(x))
    if not train:
        whole = m(x)
        torch.testing.assert_close(whole[:, 4:, 4:], m(x[:, 4:, 4:]))
        torch.testing.assert_close(whole[:, :4, :4], m(x[:, :4, :4]))
        m.uneven = "padded_input"
        assert not torch.allclose(m(x), whole)
        torch.testing.assert_close(m(x), m(F.pad(x, (0, 0, 0, 1, 0, 2)))[:, :6, :7])


def test_a_grid_smaller_than_the_window_uses_the_biases_of_its_offsets():
    m = weighted(CascadedGroupAttention(12, 3, key_dim=4, window_size=5)).eval()
    small = CascadedGroupAttention(12, 3, key_dim=4, window_size=3).double().eval()
    table = m.attention_biases.data.view(3, 5, 5)[:, :3, :3].reshape(3, 9)
    small.load_state_dict({**m.state_dict(), "attention_biases": table})
    x = tokens(2, 3, 3, 12)
    torch.testing.assert_close(m(x), small(x))


def test_fused_convolutions_of_timm_are_taken_as_they_are():
    theirs, ours = pair()
    theirs.eval()
    ours.eval()
    x = tokens(1, 7, 7, 48)
    expected = ours(x)
    fuse = lambda part: part.fuse().double()  # noqa: E731
    ours.qkvs = nn.ModuleList(fuse(part) for part in theirs.attn.qkvs)
    ours.dws = nn.ModuleList(fuse(part) for part in theirs.attn.dws)
    ours.proj[1] = fuse(theirs.attn.proj[1])
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)  # timm fuses in float32
    assert not any(isinstance(part, nn.BatchNorm2d) for part in ours.modules())


def test_resizing_the_window_is_timms():
    theirs, ours = pair(window=4)
    theirs.window_resolution = 7
    theirs.set_input_size(6)
    ours.resize_window(6)
    torch.testing.assert_close(ours.attention_biases, theirs.attn.attention_biases)
    x = tokens(1, 6, 6, 48)
    torch.testing.assert_close(ours.eval()(x), of_map(theirs.eval(), x), rtol=1e-12, atol=1e-12)


def test_without_cascade_convolution_and_biases_it_is_attention_of_one_head():
    m = weighted(CascadedGroupAttention(8, 1, key_dim=4, kernels=1, window_size=9)).eval()
    with torch.no_grad():
        m.attention_biases.zero_()
        m.dws[0].conv.weight.fill_(1.0)
    nn.init.ones_(m.dws[0].bn.running_var)
    m.dws[0].bn.eps = 0.0
    for norm in (m.dws[0].bn,):
        nn.init.zeros_(norm.running_mean)
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    x = tokens(2, 3, 4, 8)
    query, key, value = m.qkvs[0](x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2).split([4, 4, 8], -1)
    y = F.scaled_dot_product_attention(query, key, value)
    expected = m.proj(y.transpose(1, 2).unflatten(2, (3, 4))).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), expected)


def test_the_flop_counter_knows_the_kernel():
    m = CascadedGroupAttention(48, 3, kernels=(5, 3, 3)).eval()
    counts = []
    for backend in ("cpu", "reference"):
        m.backend = backend
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            m(torch.zeros(1, 14, 14, 48))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"kernels": 4}, "kernels must be odd, got 4"),
        ({"kernels": (3,)}, r"kernels must be one size or at least 2, one per head, got \(3,\)"),
        ({"uneven": "wrapped"}, "uneven must be one of 'masked', 'padded_input', got 'wrapped'"),
        ({"qkv_bias": False}, "qkv_bias must be True: the batch normalisation"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        CascadedGroupAttention(8, 2, **options)


def test_bad_arguments_of_the_operation():
    good = {
        "x": torch.zeros(1, 4, 4, 32),
        "weight": torch.zeros(2, 48, 16),
        "bias": torch.zeros(2, 48),
        "taps": torch.zeros(2, 16, 3, 3),
        "tap_bias": torch.zeros(2, 16),
        "table": torch.zeros(2, 16),
    }
    assert cascaded_group_attention(*good.values(), window=(4, 4)).shape == (1, 4, 4, 32)
    for change, window, text in [
        ({"weight": torch.zeros(2, 40, 16)}, (4, 4), r"agree in shape, got \(2, 48, 16\) and \(2, 40, 16\)"),
        ({"taps": torch.zeros(2, 16, 2, 2)}, (4, 4), "taps must have an odd size"),
        ({"table": torch.zeros(2, 15)}, (4, 4), r"table must be \(heads=2, side\^2\), got \(2, 15\)"),
        ({}, (5, 4), r"window must be 1 to 4, the side of the table, along each axis, got \(5, 4\)"),
        ({"bias": torch.zeros(2, 48, dtype=torch.float64)}, (4, 4), "x and bias must agree in dtype"),
    ]:
        with pytest.raises(ValueError, match=text):
            cascaded_group_attention(*{**good, **change}.values(), window=window)
    narrow = {**good, "x": torch.zeros(1, 4, 4, 16), "weight": torch.zeros(2, 40, 8), "bias": torch.zeros(2, 40)}
    with pytest.raises(ValueError, match="it takes multiples of 16 channels of a head's query and value, got 8"):
        cascaded_group_attention(*narrow.values(), window=(4, 4), backend="cpu")
