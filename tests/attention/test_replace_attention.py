"""replace_attention on timm models: same outputs where the mechanism is exact, a plain report where it cannot swap."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import coterie
from coterie.attention import (
    DynamicGroupAttention,
    GlobalAttention,
    follow_learning_rate,
    initialize_centroids,
    replace_attention,
)

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def vit(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **options}).eval()


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "reg_tokens": 2}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit_tiny_patch16_224", {"qkv_bias": False}),
    ],
)
@pytest.mark.parametrize(
    ("attention", "extra"),
    [("dynamic_group", {"groups": 4, "top_k": 99}), ("global", {}), ("shifted_window", {"window_size": 99})],
)
def test_outputs_are_kept_where_the_mechanism_is_exact(name, options, attention, extra):
    model, x = vit(name, **options), images()
    before, keys = model(x), set(model.state_dict())
    weight = model.blocks[0].attn.qkv.weight
    report = replace_attention(model, attention, **extra)
    assert report.swapped == ["blocks.0.attn", "blocks.1.attn"]
    assert report.skipped == {}
    torch.testing.assert_close(model(x), before)
    assert model.blocks[0].attn.qkv.weight is weight
    assert {k for k in model.state_dict() if "centroids" not in k} == keys


def test_it_trains_copies_compiles_and_is_not_exact_with_fewer_keys():
    model, x = vit(), images()
    before = model(x)
    report = coterie.replace_attention(model, "dynamic_group", groups=4, top_k=3)
    assert "2 swapped for 'dynamic_group', 0 left as they were" in str(report)
    assert not torch.allclose(model(x), before)
    assert initialize_centroids(model, x) == report.swapped
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    follow_learning_rate(model, optimizer)
    start = model.blocks[0].attn.centroids.clone()
    model.set_grad_checkpointing()
    model.train()(x).square().sum().backward()
    assert model.blocks[0].attn._counts.sum() == 2 * 3 * 17
    optimizer.step()
    assert not torch.equal(model.blocks[0].attn.centroids, start)
    model.eval()
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), model(x))
    torch._dynamo.reset()
    model.set_grad_checkpointing(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_prefix_tokens_may_be_global():
    model, x = vit(reg_tokens=2), images()
    replace_attention(model, "dynamic_group", groups=4, top_k=3, global_tokens=model.num_prefix_tokens)
    assert model.blocks[0].attn.global_tokens == 3
    assert model(x).isfinite().all()


def test_what_cannot_be_swapped_is_said():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=12, depths=(1, 1), num_heads=(1, 2)
    )
    report = replace_attention(swin, "dynamic_group")
    assert report.swapped == []
    assert list(report.skipped) == ["layers.0.blocks.0.attn", "layers.1.blocks.0.attn"]
    assert "WindowAttention adds a relative position bias" in str(report)

    report = replace_attention(vit(), "cross_shaped_window")
    assert report.swapped == []
    assert "works on 2-dimensional grids, and this block hands over a sequence" in report.skipped["blocks.1.attn"]

    model = vit(attn_drop_rate=0.1)
    assert "attn_drop.p=0.1" in replace_attention(model, "global").skipped["blocks.0.attn"]
    for block in model.blocks:
        block.attn.attn_drop.p = 0.0
    assert len(replace_attention(model, "global").swapped) == 2
    assert "GlobalAttention of this library already" in replace_attention(model, "global").skipped["blocks.0.attn"]

    pooled = vit(global_pool="map", class_token=False)
    report = replace_attention(pooled, "global")
    assert report.swapped == ["blocks.0.attn", "blocks.1.attn"]
    assert "AttentionPoolLatent is not timm.layers.Attention" in report.skipped["attn_pool"]

    torch_own = nn.TransformerEncoderLayer(8, 2)
    assert "MultiheadAttention is not timm" in replace_attention(torch_own, "global").skipped["self_attn"]
    empty = replace_attention(nn.Linear(2, 2), "global")
    assert (empty.swapped, empty.skipped) == ([], {})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gated": True}, "gates its output"),
        ({"scale_norm": True, "norm_layer": nn.LayerNorm}, "normalises its output"),
        ({"attn_head_dim": 4}, "24 channels in, 12 in its heads, 24 out"),
        ({"dim_out": 12}, "24 channels in, 24 in its heads, 12 out"),
    ],
)
def test_variants_of_timms_attention(options, text):
    model = nn.ModuleDict({"attn": timm.layers.Attention(24, 3, **options)})
    assert text in replace_attention(model, "global").skipped["attn"]


def test_scale_dropout_dtype_and_mode_are_carried_over():
    model = nn.ModuleDict({"attn": timm.layers.Attention(24, 3, proj_drop=0.25).to(torch.bfloat16).eval()})
    model["attn"].scale = 0.5
    replace_attention(model, "dynamic_group", groups=4, top_k=3)
    new = model["attn"]
    assert isinstance(new, DynamicGroupAttention)
    assert (new.scale, new.proj_drop.p, new.training) == (0.5, 0.25, False)
    assert new.centroids.dtype == torch.float32
    assert new(torch.randn(1, 9, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_attn_mask_of_timm_is_a_padding_mask_or_refused():
    original = timm.layers.Attention(24, 3).eval()
    model = nn.ModuleDict({"attn": copy.deepcopy(original)})
    replace_attention(model, "global")
    assert isinstance(model["attn"], GlobalAttention)
    x, mask = torch.randn(2, 9, 24), torch.arange(9).expand(2, 1, 1, 9) < 6
    torch.testing.assert_close(model["attn"](x, attn_mask=mask), original(x, attn_mask=mask))
    torch.testing.assert_close(model["attn"](x, attn_mask=None, is_causal=True), original(x, is_causal=True))
    with pytest.raises(ValueError, match=r"attn_mask must be a bool mask over keys of shape .* = \(2, 1, 1, 9\)"):
        model["attn"](x, attn_mask=torch.zeros(2, 1, 9, 9))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"attention must be one of .*'cross_shaped_window', 'dynamic_group'"):
        replace_attention(vit(), "locality")
    with pytest.raises(ValueError, match=r"has no option 'window'; it takes: .*top_k"):
        replace_attention(vit(), "dynamic_group", window=3)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        replace_attention(vit(), "dynamic_group", top_k=0)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        replace_attention("vit", "dynamic_group")
