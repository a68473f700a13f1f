"""replace_attention on timm's DaViT and EfficientViT: the same outputs, parameters and names with our attention."""

import copy
import io
import pickle

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from coterie.attention import (
    CascadedGroupAttention,
    ChannelGroupAttention,
    ShiftedWindowAttention,
    replace_attention,
)
from coterie.testing import generated_weights

NARROW = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1), "num_classes": 5}
FLORENCE = {**NARROW, "channel_attn_v2": True, "named_blocks": True, "down_kernel_size": 3, "cpe_act": True}
EFFICIENT = {"embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 1, 2), "num_classes": 5}
DUAL = ("channel_group", "shifted_window")
CASES = {
    "davit_tiny": (NARROW, DUAL),
    "davit_base_fl": (FLORENCE, DUAL),
    "efficientvit_m0": ({**EFFICIENT, "kernels": (5, 5, 5, 5)}, ("cascaded_group",)),
    "efficientvit_m4": (EFFICIENT, ("cascaded_group",)),
}


def made(name, seed=1, **options):
    """timm's model in float64; norms, their running statistics and biases made from names and shapes."""
    torch.manual_seed(seed)
    m = timm.create_model(name, **{**CASES[name][0], **options}).double().eval()
    state = m.state_dict()
    vectors = ((n, t.shape) for n, t in state.items() if t.is_floating_point() and (t.ndim < 2 or "biases" in n))
    weights = generated_weights(vectors, seed)
    m.load_state_dict({**state, **{n: 0.5 + t.abs() if n.endswith("running_var") else t for n, t in weights.items()}})
    return m


def swapped(m, name, **options):
    m = copy.deepcopy(m)
    for attention in CASES[name][1]:
        assert replace_attention(m, attention, **options).swapped
    return m


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(224, 224), (230, 250)])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_names_are_kept(name, size):
    theirs = made(name)
    ours = swapped(theirs, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    x = images(*size, batch=1)
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
        for mine, other in zip(
            ours.forward_intermediates(x, intermediates_only=True), theirs.forward_intermediates(x)[1]
        ):
            torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("name", ["davit_tiny", "efficientvit_m4"])
def test_a_training_step_is_kept(name):
    theirs = made(name).train()
    ours = swapped(theirs, name)
    x = images(70, 90)
    for m in (theirs, ours):
        m.set_grad_checkpointing(m is ours and name == "davit_tiny")
        m(x).square().sum().backward()
    for (n, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-10, msg=lambda text, n=n: f"{n}: {text}")
    for n, value in theirs.state_dict().items():  # running statistics
        torch.testing.assert_close(ours.state_dict()[n], value, rtol=1e-10, atol=1e-12)


def test_the_report_says_what_was_swapped_and_what_not():
    m = made("davit_tiny")
    weight, blocks = m.stages[2].blocks[0][1].attn.qkv.weight, type(m.stages[0].blocks[0][0])
    report = replace_attention(m, "channel_group")
    assert report.swapped == [f"stages.{s}.blocks.{b}.1.attn" for s, b in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))]
    assert (
        report.skipped["stages.0.blocks.0.0.attn"]
        == "WindowAttention is the like of 'shifted_window', not of 'channel_group'"
    )
    assert isinstance(m.stages[2].blocks[0][1].attn, ChannelGroupAttention)
    assert m.stages[2].blocks[0][1].attn.qkv.weight is weight
    assert type(m.stages[0].blocks[0][0]) is blocks  # the other blocks are as they were
    report = replace_attention(m, "shifted_window")
    assert len(report.swapped) == 5
    assert "ChannelGroupAttention of this library already" in report.skipped["stages.0.blocks.0.1.attn"]
    window = m.stages[0].blocks[0][0].attn
    assert isinstance(window, ShiftedWindowAttention)
    assert (window.window_size, window.shifts, window.uneven) == ((7, 7), False, "padded_input")
    assert replace_attention(m, "global").swapped == []

    m = made("efficientvit_m4")
    report = replace_attention(m, "channel_group")
    assert report.swapped == []
    assert set(report.skipped.values()) == {
        "LocalWindowAttention is the like of 'cascaded_group', not of 'channel_group'"
    }
    report = replace_attention(m, "cascaded_group")
    assert report.swapped == [f"stages.{s}.blocks.{b}.mixer.m" for s, b in ((0, 0), (1, 0), (2, 0), (2, 1))]
    inner = m.stages[2].blocks[1].mixer.m.attn
    assert isinstance(inner, CascadedGroupAttention)
    assert (inner.window_size, inner.uneven, inner.key_dim) == (4, "padded_input", 16)

    alone = timm.models.davit.SpatialBlock(8, 2)
    assert "is not inside a block of timm's DaViT" in replace_attention(alone, "shifted_window").skipped["attn"]
    with pytest.raises(
        ValueError, match="window_size belongs to the weights of the model, which are kept: leave it out"
    ):
        replace_attention(made("efficientvit_m4"), "cascaded_group", window_size=5)


@pytest.mark.parametrize("name", ["davit_tiny", "efficientvit_m4"])
def test_padding_can_be_left_out(name):
    theirs = made(name)
    masked = copy.deepcopy(theirs)
    replace_attention(masked, "shifted_window" if name == "davit_tiny" else "cascaded_group", uneven="masked")
    uneven = images(100, 130, batch=1)
    with torch.no_grad():
        assert not torch.allclose(masked(uneven), theirs(uneven), rtol=1e-6)
        x = images(224, 224, batch=1)  # windows divide every map
        torch.testing.assert_close(masked(x), theirs(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["davit_tiny", "efficientvit_m4"])
def test_features_only_copies_pickles_and_loads(name):
    options, mechanisms = CASES[name]
    theirs = timm.create_model(
        name, features_only=True, **{k: v for k, v in options.items() if k != "num_classes"}
    ).eval()
    ours = copy.deepcopy(theirs)
    for attention in mechanisms:
        assert replace_attention(ours, attention).swapped
    x = images(96, 64).float()
    with torch.no_grad():
        for mine, other in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)

    m = made(name).float()
    o = swapped(m, name)
    with torch.no_grad():
        expected = o(x)
        for other in (copy.deepcopy(o), pickle.loads(pickle.dumps(o))):
            torch.testing.assert_close(other(x), expected)
        torch.testing.assert_close(o.to(memory_format=torch.channels_last)(x), expected, rtol=1e-4, atol=1e-4)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    o.load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_efficientvit_changes_its_input_size_as_before():
    theirs = made("efficientvit_m4")
    ours = swapped(theirs, "efficientvit_m4")
    for m in (theirs, ours):
        m.set_input_size(288)
    x = images(288, 288, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


# parameters, and GMACs at 224 x 224 as the READMEs and the DaViT's measurement give them
PUBLISHED = {
    "davit_tiny": (28_360_168, 4.540),
    "davit_small": (49_745_896, 8.800),
    "davit_base": (87_954_408, 15.510),
    "efficientvit_m0": (2_349_436, 0.079),
    "efficientvit_m1": (2_980_560, 0.167),
    "efficientvit_m2": (4_187_554, 0.201),
    "efficientvit_m3": (6_900_722, 0.263),
    "efficientvit_m4": (8_804_228, 0.299),
    "efficientvit_m5": (12_473_772, 0.522),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_gmacs_of_the_published_variants(name):
    parameters, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        m = timm.create_model(name).eval()
        x = torch.empty(1, 3, 224, 224)

    def count():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            m(x)
        return counter.get_total_flops() / 2e9

    if name.startswith("davit"):
        replace_attention(m, "channel_group", form="projected")
        replace_attention(m, "shifted_window")
    else:
        replace_attention(m, "cascaded_group")
    assert sum(p.numel() for p in m.parameters()) == parameters
    assert count() == pytest.approx(gmacs, rel=0.01)
    if name == "davit_tiny":
        for part in m.modules():
            if isinstance(part, ChannelGroupAttention):
                part.form = "auto"
        assert count() < 0.99 * gmacs  # the composed form has less to do
