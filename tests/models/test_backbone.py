"""Backbone: four maps of any model, at any image size."""

import pytest
import torch
from small_dgt import images

from coterie.models.backbone import Backbone

SMALL_DGT = {"dims": (16, 16, 32, 48), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 3)}
MODELS = {
    "dgt_pico": {**SMALL_DGT, "stem_stride": 2},
    "resnet10t": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 48},
}


def backbone(name, **options):
    torch.manual_seed(0)
    return Backbone(name, **{**MODELS[name], **options})


@pytest.mark.parametrize("name", MODELS)
def test_four_maps_at_ceil_sizes_with_gradients_everywhere(name):
    model = backbone(name).train()
    assert model.strides == [4, 8, 16, 32]
    for height, width in [(64, 64), (70, 101)]:
        maps = model(images(2, height, width))
        for x, channels, stride in zip(maps, model.channels, model.strides, strict=True):
            assert x.shape == (2, channels, -(-height // stride), -(-width // stride))
    sum(x.square().mean() for x in maps).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["dgt_pico", "resnet10t"])
def test_maps_are_zero_at_padding_and_normalised_elsewhere(name):
    model = backbone(name).eval()
    mask = torch.ones(2, 70, 90, dtype=torch.bool)
    mask[0, 41:] = False
    mask[1, :, 50:] = False
    for x, stride in zip(model(images(2, 70, 90), mask), model.strides, strict=True):
        real = mask[:, ::stride, ::stride]
        assert not x.permute(0, 2, 3, 1)[~real].any()
        tokens = x.permute(0, 2, 3, 1)[real]
        torch.testing.assert_close(tokens.mean(1), torch.zeros(len(tokens)), atol=1e-4, rtol=0)
        torch.testing.assert_close(tokens.var(1, unbiased=False), torch.ones(len(tokens)), atol=1e-2, rtol=0)


def test_padding_does_not_change_the_maps_of_a_dgt():
    model = backbone("dgt_pico").double().eval()
    x = images(1, 50, 77).double()
    alone = model(x)
    canvas = torch.full((1, 3, 96, 96), 9.0, dtype=torch.float64)
    mask = torch.zeros(1, 96, 96, dtype=torch.bool)
    canvas[:, :, :50, :77], mask[:, :50, :77] = x, True
    for got, expected in zip(model(canvas, mask), alone, strict=True):
        torch.testing.assert_close(got[:, :, : expected.shape[2], : expected.shape[3]], expected)


def test_models_of_small_strides_keep_them():
    assert backbone("dgt_pico", stem_stride=1).strides == [2, 4, 8, 16]


def test_maps_without_norm_are_those_of_the_model():
    model = backbone("dgt_pico", norm=False).eval()
    x = images(1, 64, 64)
    with torch.no_grad():
        for got, expected in zip(model(x), model.model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(got, expected)


def test_frozen_batch_norm_keeps_its_statistics():
    model = backbone("resnet10t", frozen_batch_norm=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model(images(2, 64, 64))
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    moving = backbone("resnet10t").train()
    start = moving.state_dict()["model.bn1.running_mean"].clone()
    moving(images(2, 64, 64))
    assert not torch.equal(moving.state_dict()["model.bn1.running_mean"], start)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="did you mean dgt_tiny"):
        Backbone("dgt_tinny")
    with pytest.raises(ValueError, match=r"backbone resnet10t: .*unexpected keyword argument 'attention'"):
        Backbone("resnet10t", attention="global")
    with pytest.raises(ValueError, match="four maps of strides s, 2s, 4s, 8s; dgt_pico has 4, 8, 16"):
        Backbone(
            "dgt_pico", stem_stride=2, dims=(16, 16, 32), depths=(1, 1, 1), num_heads=(1, 1, 1), attention="global"
        )
