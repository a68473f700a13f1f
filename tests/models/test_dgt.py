"""DGT: the function it computes, its options, its state."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_dgt import images, small_dgt

import coterie
from coterie.models import create_model


def _written_out(model, x):
    """The network of the module's docstring with nothing fused or folded, on a model in evaluation."""
    for index, stage in enumerate(model.stages):
        x = stage.downsample.conv(model.stem(x) if index == 0 else x).permute(0, 2, 3, 1)
        x = stage.downsample.norm(x)
        for block in stage.blocks:
            x = x + block.position.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            if block.post_norm:
                x = x + block.norm1(block.attn(x))
                x = x + block.norm2(_feed_forward(block.mlp, x))
            else:
                x = x + block.attn(block.norm1(x))
                x = x + _feed_forward(block.mlp, block.norm2(x))
        x = x.permute(0, 3, 1, 2)
    x = model.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return model.head.fc(model.head.pre_logits(x).mean((2, 3)))


def _feed_forward(mlp, x):
    x = mlp.norm1(torch.nn.functional.gelu(mlp.expand(x)).permute(0, 3, 1, 2))
    x = mlp.norm2(torch.nn.functional.gelu(x + mlp.depthwise(x)))
    return mlp.norm3(mlp.project(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _trained(model):
    """Running statistics and scales as after some training, so that folding has something to fold."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_equals_the_network_written_out(post_norm, similarity):
    model = _trained(small_dgt(post_norm=post_norm, similarity=similarity)).double().eval()
    x = images(height=24, width=40).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x), _written_out(model, x), rtol=1e-10, atol=1e-10)


def test_enough_keys_make_it_the_same_network_with_global_attention():
    grouped = small_dgt(attention="dynamic_group", attention_options={"top_k": 256}).double().eval()
    exact = small_dgt(attention="global").double().eval()
    missing = exact.load_state_dict(grouped.state_dict(), strict=False)
    assert not missing.missing_keys
    assert all("centroid" in key or "tau" in key for key in missing.unexpected_keys)
    x = images().double()
    torch.testing.assert_close(grouped(x), exact(x), rtol=1e-9, atol=1e-9)
    few = small_dgt(attention="dynamic_group", attention_options={"top_k": 2}).double().eval()
    assert not torch.allclose(few(x), exact(x), atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1), (64, 16)])
def test_any_size(size):
    model = small_dgt().eval()
    maps = model.forward_intermediates(images(1, *size), intermediates_only=True)
    for index, (feature, info) in enumerate(zip(maps, model.feature_info)):
        assert info["reduction"] == 2 ** (index + 1)
        assert feature.shape[2:] == tuple(-(-side // info["reduction"]) for side in size)
        assert feature.isfinite().all()
    assert model(images(1, *size)).shape == (1, 5)


def test_evaluation_does_not_depend_on_the_rest_of_the_batch():
    model = small_dgt().double().eval()
    x = images(3).double()
    together = model(x)
    assert torch.equal(together, model(x))
    for index in range(3):
        torch.testing.assert_close(model(x[index : index + 1])[0], together[index], rtol=1e-10, atol=1e-10)


def test_channels_last_and_strided_images_give_the_same():
    model = small_dgt().double().eval()
    x = images().double()
    expected = model(x)
    laid_out = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(laid_out(x.contiguous(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(model(x.flip(-1).flip(-1).transpose(2, 3).transpose(2, 3)), expected)
    features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("way", ["autocast", "model"])
def test_bfloat16(way):
    model = small_dgt().eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        if way == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                got = model(x)
        else:
            got = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("seed", [0, 1])
def test_gradient_checkpointing_gives_the_same_step(seed):
    plain, frugal = small_dgt(seed, drop_path_rate=0.3), small_dgt(seed, drop_path_rate=0.3)
    frugal.set_grad_checkpointing()
    x = images(4)
    for model in (plain.train(), frugal.train()):
        torch.manual_seed(seed)
        model(x).square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), frugal.named_parameters()):
        torch.testing.assert_close(one.grad, other[1].grad, rtol=1e-5, atol=1e-7, msg=name)
    frugal.set_grad_checkpointing(False)
    assert not any(stage.grad_checkpointing for stage in frugal.stages)


def test_weights_go_through_a_file(tmp_path):
    model, other = _trained(small_dgt(0)).eval(), small_dgt(1).eval()
    x = images()
    assert not torch.allclose(model(x), other(x), atol=1e-3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(x), other(x))


def test_stochastic_depth_grows_linearly_over_all_blocks():
    model = small_dgt(depths=(1, 2, 2, 1), drop_path_rate=0.5)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_initial_weights_are_those_of_cmt():
    model = create_model("dgt_nano")
    block = model.stages[3].blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mlp.expand.weight.std().item() == pytest.approx((2 / (4 * 192)) ** 0.5, rel=0.05)
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith(".bias"))


def test_attention_by_stage_with_options():
    names = ("shifted_window", "dynamic_group", "cross_shaped_window", "global")
    model = small_dgt(attention=names, attention_options={"top_k": 5, "window_size": 3}, similarity="cosine")
    attention = [stage.blocks[0].attn for stage in model.stages]
    assert [type(a).__name__ for a in attention] == [
        "ShiftedWindowAttention",
        "DynamicGroupAttention",
        "CrossShapedWindowAttention",
        "GlobalAttention",
    ]
    assert attention[1].top_k == 5
    assert attention[1].groups == 8  # the model's own for its second stage
    assert all(a.similarity == "cosine" for a in attention)
    assert model.eval()(images()).isfinite().all()
    by_stage = small_dgt(
        attention="dynamic_group", attention_options=({"groups": 2}, {}, {"groups": 7, "top_k": 3}, {})
    )
    attention = [stage.blocks[0].attn for stage in by_stage.stages]
    assert [a.groups for a in attention] == [2, 8, 7, 4]
    assert [a.top_k for a in attention] == [32, 16, 3, 16]


def test_windows_shift_in_every_other_block_of_a_stage():
    model = small_dgt(depths=(1, 3, 1, 1), attention="shifted_window")
    assert [block.attn.shifts for block in model.stages[1].blocks] == [False, True, False]


def test_weight_decay_spares_temperatures_and_centroids_are_no_parameters():
    model = small_dgt(similarity="cosine")
    assert model.no_weight_decay() == {f"stages.{stage}.blocks.0.attn.logit_scale" for stage in range(4)}
    assert not any("centroid" in name for name, _ in model.named_parameters())
    assert any("centroids" in name for name in model.state_dict())


def test_create_model_of_the_package_is_this_one():
    assert coterie.create_model is create_model
    assert sum(p.numel() for p in coterie.create_model("resnet10t", device="meta").parameters()) > 0  # timm's too


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention": "sparse"}, ValueError, "got 'sparse'"),
        ({"attention": ("global", "global")}, ValueError, "one name or 4, one per stage, got 2"),
        ({"attention": (1, 2, 3, 4)}, TypeError, "attention must be a name"),
        ({"attention_options": {"topk": 3}}, ValueError, "no stage's attention has 'topk'.*takes .*top_k"),
        ({"attention_options": [{}, {}]}, ValueError, "one mapping or 4, one per stage, got 2"),
        ({"attention_options": [1, 2, 3, 4]}, TypeError, "one mapping per stage"),
        ({"attention": "global", "attention_options": {"top_k": 3}}, ValueError, "no stage's attention has 'top_k'"),
        ({"attention_options": {"top_k": 0}}, ValueError, "top_k must be at least 1, got 0"),
        ({"dims": (16, 16, 32)}, ValueError, "one entry per stage"),
        ({"dims": (15, 15, 30, 30)}, ValueError, r"dims\[0\] must be even"),
        ({"num_heads": (3, 3, 3, 3)}, ValueError, "num_heads must divide dim, got num_heads=3 and dim=16"),
        ({"depths": (0, 1, 1, 1)}, ValueError, "each of depths must be at least 1, got 0"),
        ({"in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ({"in_chans": 1.0}, TypeError, "in_chans must be an int, got float"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
        ({"stem_stride": 0}, ValueError, "stem_stride must be at least 1"),
        ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate must be at least 0 and below 1, got 1.0"),
        ({"drop_rate": -0.1}, ValueError, "drop_rate must be at least 0"),
        ({"global_pool": "mean"}, ValueError, "global_pool must be one of .* got 'mean'"),
        ({"similarity": "euclid"}, ValueError, "similarity must be one of"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        small_dgt(**arguments)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match=r"no model is named 'dgt_tinny': did you mean dgt_tiny"):
        create_model("dgt_tinny")
    with pytest.raises(ValueError, match=r"no model is named 'qqqqqq': coterie has .*dgt_base, "):
        create_model("qqqqqq")
    with pytest.raises(TypeError, match="name must be a str, got int"):
        create_model(3)


def test_bad_indices():
    model = small_dgt()
    for indices in (0, 5, [4], [-5], []):
        with pytest.raises(ValueError, match="indices must be stages 0 to 3"):
            model.forward_intermediates(images(), indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NHWC', got 'NLC'"):
        model.forward_intermediates(images(), output_fmt="NLC")
