"""Agent-DeiT against figures that the authors' code gave (tests/golden/make_agent.py), and timm's interface."""

import pytest
import timm
import torch
from agent_cases import check_figures, figures_of, make_agent, model_of
from timm.models import group_parameters

from coterie.attention import AgentAttention
from coterie.models import create_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5, "agents": 3}


def small(**kwargs):
    torch.manual_seed(0)
    return create_model("agent_deit_tiny", **{**SMALL, **kwargs}).eval()


def images(batch=2, height=32, width=32, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [
        ("deit_tiny_224", torch.float64, 1e-12),
        ("deit_tiny_144", torch.float64, 1e-12),
        ("deit_tiny_144", torch.float32, 2e-5),
    ],
)
def test_ours_equals_the_authors(case, dtype, tolerance):
    figures = figures_of(case)
    model = model_of(figures, dtype)
    image = make_agent.image_of(figures["size"], dtype)
    with torch.no_grad():
        _, layers = model.forward_intermediates(image, indices=[2, 5, 8, 11], return_prefix_tokens=True)
        logits = model(image)
    tokens = [torch.cat([prefix[0], maps[0].flatten(1).T]) for maps, prefix in layers]
    check_figures(figures, logits, tokens, tolerance)


@pytest.mark.parametrize(("height", "width"), [(48, 24), (24, 48), (32, 32), (20, 9), (8, 8)])
def test_images_of_any_shape(height, width):
    """Two shapes with equally many patches are told apart."""
    model, x = small(), images(1, height, width)
    alone = model(x)
    model(images(1, width, height))
    assert torch.equal(model(x), alone)
    other = small(img_size=(-(-height // 8) * 8, -(-width // 8) * 8), dynamic_img_size=False)
    assert other(images(1, *other.patch_embed.img_size)).isfinite().all()


def test_only_the_first_blocks_have_agents():
    kinds = [type(block.attn) is AgentAttention for block in small(agent_blocks=2).blocks]
    assert kinds == [True, True, False]
    with pytest.raises(ValueError, match="agent_blocks must be at least 0, got -1"):
        small(agent_blocks=-1)
    with pytest.raises(ValueError, match=r"cannot have agent attention: it drops attention weights"):
        small(attn_drop_rate=0.1)


def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none():
    gradients = []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        model(images(3, 32, 48)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        assert all(p.grad.abs().sum() > 0 for p in model.blocks[:-1].parameters())  # the head reads one token only
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_features_classifier_groups_and_tracing():
    model, x = small(), images(2, 32, 40)
    features = small(features_only=True, out_indices=(0, 2))(x)
    assert [tuple(f.shape) for f in features] == [(2, 24, 4, 5)] * 2
    node = timm.models.get_graph_node_names(model)[1][-1]
    extractor = timm.models.create_feature_extractor(model, {node: "out"})
    for images_ in (x, images(2, 24, 48)):
        torch.testing.assert_close(extractor(images_)["out"], model(images_))
    groups = group_parameters(model, model.group_matcher())
    assert sorted(n for g in groups.values() for n in g) == sorted(n for n, _ in model.named_parameters())
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


def test_bad_images():
    with pytest.raises(ValueError, match=r"images must have shape \(batch, 3, height, width\), got \(2, 1, 32, 32\)"):
        small()(images(channels=1))
