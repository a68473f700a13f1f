"""Channel group attention: equal to timm's modules on shared weights, in both forms; the paper's properties."""

import json
from pathlib import Path

import pytest
import torch
from timm.models.davit import ChannelAttention, ChannelAttentionV2
from torch import nn

from coterie.attention import ChannelGroupAttention
from coterie.testing import generated_tensor, generated_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "davit"
FORMS = ["projected", "composed"]


def weighted(m, seed=1):
    """The module in float64, with weights made from names and shapes."""
    m = m.double()
    m.load_state_dict(generated_weights(((n, t.shape) for n, t in m.state_dict().items()), seed))
    return m


def tokens(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 7, 60])
def test_it_is_timms_channel_attention(form, bias, count):
    theirs = weighted(ChannelAttention(24, 3, qkv_bias=bias))
    ours = ChannelGroupAttention(24, 3, qkv_bias=bias, form=form).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, count, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours(x.view(2, count, 1, 24)), theirs(x).view(2, count, 1, 24), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_it_is_florence_2s_channel_attention(form, dynamic):
    theirs = weighted(ChannelAttentionV2(24, 3, dynamic_scale=dynamic))
    ours = ChannelGroupAttention(24, 3, form=form, scale="tokens" if dynamic else "head", order="qkv").double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, 50, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_timms(form):
    theirs = weighted(ChannelAttention(16, 2, qkv_bias=True))
    ours = ChannelGroupAttention(16, 2, form=form).double()
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for m in (theirs, ours):
        x = tokens(2, 40, 16).requires_grad_()
        (m(x) * tokens(2, 40, 16, seed=3)).sum().backward()
        gradients.append([x.grad, *(m.get_parameter(n).grad for n, _ in theirs.named_parameters())])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"scale": "tokens"}, {"order": "qkv"}, {"qkv_bias": False}])
def test_padding_contributes_nothing(form, options):
    m = weighted(ChannelGroupAttention(16, 2, form=form, **options))
    x, mask = tokens(2, 5, 6, 16), torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[0, :4, :5] = mask[1, :2] = True
    y = m(x, mask=mask)
    torch.testing.assert_close(y[:1, :4, :5], m(x[:1, :4, :5]))
    torch.testing.assert_close(y[1:, :2], m(x[1:, :2]))


def test_groups_of_one_channel_are_a_linear_map():
    """As many heads as channels: the softmax over one entry is 1, and attention is the linear map q."""
    m = weighted(ChannelGroupAttention(6, 6))
    x = tokens(1, 9, 6)
    query = nn.functional.linear(x, m.qkv.weight[:6], m.qkv.bias[:6])
    torch.testing.assert_close(m(x), m.proj(query))


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_tokens_does_not_matter(form):
    m, x = weighted(ChannelGroupAttention(16, 2, form=form)), tokens(1, 30, 16)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order])
    maps = m.maps(x)
    assert maps.shape == (1, 2, 8, 8)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 8, dtype=torch.float64))
    torch.testing.assert_close(m.maps(x[:, order]), maps)


def test_long_grids_are_summed_in_chunks():
    m = weighted(ChannelGroupAttention(4, 2, form="composed"))
    x = tokens(2, 64, 128, 4)
    expected = weighted(ChannelGroupAttention(4, 2, form="projected"))(x)
    torch.testing.assert_close(m(x), expected, rtol=1e-10, atol=1e-10)


def test_logits_are_summed_in_float32_in_half_precision():
    exact = weighted(ChannelGroupAttention(32, 1))
    half = ChannelGroupAttention(32, 1, dtype=torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    exact.load_state_dict(half.state_dict())
    x = tokens(1, 400, 32).bfloat16()
    reference = exact.maps(x.double())
    assert (half.maps(x) - reference).abs().max() < 0.02
    _, key, value = half._split(half.qkv(x), 3)
    rounded = (key * half.scale).transpose(-1, -2) @ value  # as it would be all in bfloat16
    assert (half.maps(x) - reference).abs().mean() < (rounded.softmax(-1) - reference).abs().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (exact.float().maps(x.float()) - reference).abs().max() < 0.02


def test_auto_takes_the_composed_form_for_many_tokens_and_plain_projections():
    m = ChannelGroupAttention(16, 2)
    assert m._composes(torch.zeros(1, 20, 16))
    assert not m._composes(torch.zeros(1, 19, 16))
    assert not m._composes(torch.zeros(1, 20, 16, dtype=torch.bfloat16))
    assert not ChannelGroupAttention(16, 2, similarity="cosine")._composes(torch.zeros(1, 20, 16))
    m.proj = nn.utils.parametrizations.weight_norm(m.proj)  # another kind of layer
    assert not m._composes(torch.zeros(1, 20, 16))
    with pytest.raises(ValueError, match="form='composed' needs plain linear projections and logits; use form='auto'"):
        ChannelGroupAttention(16, 2, similarity="cosine", form="composed")(torch.zeros(1, 20, 16))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": "dim"}, "scale must be one of 'head', 'tokens', got 'dim'"),
        ({"order": "vkq"}, "order must be one of 'kvq', 'qkv', got 'vkq'"),
        ({"form": "fast"}, "form must be one of 'auto', 'projected', 'composed', got 'fast'"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(ValueError, match=text):
        ChannelGroupAttention(8, 2, **options)


def test_it_gives_the_figures_of_the_authors_code():
    golden = json.loads((GOLDEN / "channel.json").read_text())
    m = ChannelGroupAttention(12, golden["heads"]).double()
    m.load_state_dict(generated_weights(golden["shapes"].items(), golden["seed"]))
    x = generated_tensor("x", (1, *golden["grid"], 12), golden["seed"])
    expected = torch.tensor(golden["output"], dtype=torch.float64)
    torch.testing.assert_close(m(x).flatten(0, 2), expected, rtol=1e-10, atol=1e-11)
