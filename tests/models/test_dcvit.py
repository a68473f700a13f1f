"""DCViT: everything timm's VisionTransformer does, and with zero maps exactly what it gives."""

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay

import coterie
from coterie.attention import ComposableMultiHeadAttention
from coterie.models import list_models

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def small(**kwargs):
    torch.manual_seed(0)
    return coterie.models.create_model("dcvit_tiny", **{**SMALL, **kwargs}).eval()


def timm_vit(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, "dynamic_img_size": True, **kwargs}).eval()


def images(batch=2, height=32, width=32, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "vit", "dim", "heads"),
    [
        ("dcvit_tiny", "vit_tiny_patch16_224", 192, 3),
        ("dcvit_small", "vit_small_patch16_224", 384, 6),
        ("dcvit_base", "vit_base_patch16_224", 768, 12),
    ],
)
def test_sizes_are_those_of_timms_vit_and_the_maps(name, vit, dim, heads):
    assert name in list_models()
    assert timm.is_model(name)
    assert not hasattr(timm.models, name)
    with torch.device("meta"):
        model, plain = timm.create_model(name), timm.create_model(vit)
    extra = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert extra == 12 * (20 * heads * dim + 64 * heads**2)
    assert model.pretrained_cfg["architecture"] == name
    assert all(type(block.attn) is ComposableMultiHeadAttention for block in model.blocks)


def test_with_zero_maps_it_is_timms_vit():
    model, plain = small(attention_options={"initial": "zero"}), timm_vit()
    report = model.load_state_dict(plain.state_dict(), strict=False)
    assert all(".maps." in name for name in report.missing_keys)
    assert not report.unexpected_keys
    for x in (images(), images(height=48, width=40)):
        torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("options", [{}, {"sides": ("query",)}, {"static": True, "rank": 1}, {"uses": ("post",)}])
def test_every_parameter_gets_a_gradient(options):
    model = small(attention_options=options).train()
    model(images(4)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for enable in (False, True):
        model = small().train()
        model.set_grad_checkpointing(enable)
        model(images()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_timms_whole_interface_answers_as_timms_vit():
    model, plain, x = small(), timm_vit(), images(height=40)
    assert model.forward_features(x).shape == plain.forward_features(x).shape
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x))
    final, maps = model.forward_intermediates(x, indices=[0, -1], norm=True)
    assert [m.shape for m in maps] == [m.shape for m in plain.forward_intermediates(x, indices=[0, -1])[1]]
    assert final.shape == (2, 21, 24)
    for features in (small(features_only=True), timm_vit(features_only=True)):
        assert features.feature_info.channels() == [24, 24, 24]
        assert [tuple(f.shape) for f in features(x)] == [(2, 24, 5, 4)] * 3
    assert model.prune_intermediate_layers([0, 1]) == plain.prune_intermediate_layers([0, 1]) == [0, 1]
    for kind in (small, timm_vit):
        fresh = kind()
        fresh.reset_classifier(0)
        assert fresh(x).shape == (2, 24)
        fresh.reset_classifier(7, "avg")
        assert fresh(x).shape == (2, 7)
    assert small(in_chans=1)(images(channels=1)).shape == (2, 5)
    assert small(global_pool="avg", class_token=False, reg_tokens=2)(x).shape == (2, 5)


def test_optimizer_groups():
    model = small()
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(name for group in groups.values() for name in group) == sorted(dict(model.named_parameters()))
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    without, with_decay = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    assert without["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in with_decay["params"])


def test_torch_fx_and_compile():
    for model in (small(), small(dynamic_img_size=False)):
        node = timm.models.get_graph_node_names(model)[1][-1]
        extractor = timm.models.create_feature_extractor(model, {node: "out"})
        torch.testing.assert_close(extractor(images())["out"], model(images()))
    model, x = small(), images(height=48)
    torch.testing.assert_close(timm.models.create_feature_extractor(model, {node: "out"})(x)["out"], model(x))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_meta_device_then_weights():
    model, whole = small(device="meta"), small()
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(whole.state_dict(), assign=True)
    torch.testing.assert_close(model(images()), whole(images()))
    fresh = small(device="meta").to_empty(device="cpu")
    fresh.init_weights()
    maps = fresh.blocks[0].attn.maps
    for parameter, std in maps.initial_stds():
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.3)


def test_weights_of_another_size_are_resampled_when_loaded(tmp_path):
    large = small(img_size=64)
    torch.save(large.state_dict(), tmp_path / "large.pth")
    loaded = small(pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "large.pth"), "num_classes": 5})
    assert loaded.pos_embed.shape == (1, 17, 24)
    assert torch.equal(loaded.blocks[1].attn.maps.mix, large.blocks[1].attn.maps.mix)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"images must have shape \(batch, 3, height, width\), got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "floating-point, got torch.uint8"),
        ("image.png", TypeError, "must be a torch.Tensor, got str"),
    ],
)
def test_bad_images(bad, error, message):
    with pytest.raises(error, match=message):
        small()(bad)


def test_what_composable_attention_does_not_do_is_refused():
    with pytest.raises(ValueError, match=r"blocks.0.attn cannot be composable: it drops attention weights"):
        small(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match="attention 'composable' has no option 'groups'"):
        small(attention_options={"groups": 3})
