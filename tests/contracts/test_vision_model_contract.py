"""What every pyramid of this library does, whatever it is: timm's model interface, walked over the registry.

Models that are timm's own VisionTransformer, with tokens in place of maps, are held against it in their own tests.
"""

import inspect
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo, group_parameters
from timm.optim import param_groups_weight_decay

from coterie.models import create_model, list_models

# The large ones are tested with fewer and narrower blocks: the interface is the same, and a test takes no second.
# A line for each architecture: how its names begin, and the options that make it small enough for images of 32 x 32.
_NARROW = {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)}
SMALL: dict[str, dict] = {
    "dgt_nano": {},
    "dgt_pico": {},
    "dgt_": _NARROW,
    "biformer_": {**_NARROW, "regions": (4, 4, 2, 1)},
    "agent_cswin": {**_NARROW, "img_size": 48, "agents": (3, 2, 2, 2), "stripe_width": 2},
    "agent_pvt": {**_NARROW, "img_size": 48, "agents": (3, 2, 2, 1)},
    "agent_swin": {**_NARROW, "img_size": 48, "agents": (3, 2, 2, 2), "agent_blocks": (1, 1, 1, 0)},
    "litv2_": _NARROW,
    "crossformer_": {**_NARROW, "group_size": (3, 3, 2, 2), "interval": (2, 2, 1, 1)},
}
SIDE = 32

pytestmark = pytest.mark.filterwarnings("ignore:centroids of dynamic groups")  # no optimizer follows in these tests


PYRAMIDS = [name for name in list_models() if not name.startswith(("dcvit", "agent_deit"))]


@pytest.fixture(scope="module", params=PYRAMIDS)
def name(request):
    return request.param


def _create(name, **kwargs):
    torch.manual_seed(0)
    small = next((options for start, options in SMALL.items() if name.startswith(start)), {})
    return create_model(name, **{"num_classes": 7, **small, **kwargs})


@pytest.fixture(scope="module")
def shared(name):
    """A model that tests only look at or run."""
    return _create(name).eval()


def _images(batch=2, height=SIDE, width=SIDE, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def test_the_registry_is_not_empty():
    assert {"dgt_tiny", "dgt_small", "dgt_base", "dgt_nano"} <= set(list_models())


def test_the_name_is_timms_for_no_other_model(name):
    assert timm.is_model(name)
    assert inspect.getmodule(timm.model_entrypoint(name)).__name__.startswith("coterie.models.")
    assert not hasattr(timm.models, name)  # where timm keeps the entry points of its own


def test_pretrained_cfg(name):
    model = create_model(name, device="meta")
    cfg, state = model.pretrained_cfg, model.state_dict()
    assert cfg["architecture"] == name
    assert cfg["num_classes"] == model.num_classes == model.get_classifier().out_features
    assert cfg["first_conv"] + ".weight" in state
    assert state[cfg["first_conv"] + ".weight"].shape[1] == cfg["input_size"][0] == model.in_chans
    assert state[cfg["classifier"] + ".weight"].shape[0] == cfg["num_classes"]
    reduction = model.feature_info[-1]["reduction"]
    assert cfg["pool_size"] == tuple(math.ceil(side / reduction) for side in cfg["input_size"][1:])
    assert timm.data.resolve_model_data_config(model)["input_size"] == cfg["input_size"]


def test_forward_in_its_two_halves(shared):
    x = _images(height=SIDE + 9)
    with torch.no_grad():
        logits, features = shared(x), shared.forward_features(x)
        assert torch.equal(shared.forward_head(features), logits)
        before = shared.forward_head(features, pre_logits=True)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert features.shape[1] == shared.num_features
    assert before.shape == (2, shared.head_hidden_size)


def test_every_parameter_gets_a_gradient_and_a_step_moves_it(name):
    model = _create(name).train()
    model(_images(4)).square().mean().backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter


def test_gradient_checkpointing_changes_nothing(name):
    x = _images(4)
    losses, gradients = [], []
    for enable in (False, True):
        model = _create(name).train()
        model.set_grad_checkpointing(enable)
        loss = model(x).square().mean()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*losses)
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * (1e-6 + one.abs().max().item()))


def test_reset_classifier(name):
    model = _create(name).eval()
    x = _images()
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    rows = math.ceil(SIDE / model.feature_info[-1]["reduction"])
    assert model(x).shape[2:] == (rows, rows)
    model.reset_classifier(4, "max")
    assert model(x).shape == (2, 4)
    assert isinstance(model.get_classifier(), torch.nn.Linear)
    for bad in (-1, 2.0):
        with pytest.raises((ValueError, TypeError), match="num_classes"):
            model.reset_classifier(bad)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
def test_without_classes_and_with_every_pooling(name, pool):
    x = _images()
    model = _create(name, num_classes=0, global_pool=pool).eval()
    with torch.no_grad():
        y = model(x)
        if pool:
            assert y.shape == (2, model.head_hidden_size)
            assert _create(name, global_pool=pool).eval()(x).shape == (2, 7)
        else:
            assert y.ndim == 4


def test_channels_and_dropout(name):
    model = _create(name, in_chans=1, drop_rate=0.3, drop_path_rate=0.2)
    assert model(_images(channels=1)).shape == (2, 7)
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.3 for m in model.modules())
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert max(rates) == pytest.approx(0.2)


@pytest.mark.parametrize("extractor", ["list", "dict", "getter", "hook", "fx"])
def test_features_only(name, extractor):
    x = _images(height=SIDE + 8)
    model = _create(name, features_only=True, feature_cls=extractor).eval()
    with torch.no_grad():
        features = model(x)
        features = list(features.values()) if isinstance(features, dict) else features
        expected = _create(name).eval().forward_intermediates(x, intermediates_only=True)
    assert len(features) == len(model.feature_info.channels()) >= 3
    for feature, channels, reduction, same in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), expected
    ):
        assert feature.shape == (2, channels, math.ceil((SIDE + 8) / reduction), math.ceil(SIDE / reduction))
        assert torch.equal(feature, same)


def test_features_only_of_some_stages(name):
    model = _create(name, features_only=True, out_indices=(1, 2)).eval()
    assert [f.shape[1] for f in model(_images())] == model.feature_info.channels()
    assert len(model.feature_info.channels()) == 2


def test_forward_intermediates(shared):
    x = _images()
    with torch.no_grad():
        final, maps = shared.forward_intermediates(x)
        assert torch.equal(final, shared.forward_features(x))
        assert [m.shape[1] for m in maps] == FeatureInfo(shared.feature_info, len(maps)).channels()
        last, normed = shared.forward_intermediates(x, indices=1, norm=True)
        assert torch.equal(normed[0], last)
        early = shared.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[1], maps[1])
        rows_last = shared.forward_intermediates(x, indices=[-1], output_fmt="NHWC", intermediates_only=True)
        assert torch.equal(rows_last[0].permute(0, 3, 1, 2), maps[-1])


def test_prune_intermediate_layers(name):
    model, whole = _create(name).eval(), _create(name).eval()
    x = _images()
    parameters = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert sum(p.numel() for p in model.parameters()) < parameters
    expected = whole.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    maps = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(maps, expected))
    assert model.num_features == maps[-1].shape[1]
    assert model(x).shape == maps[-1].shape
    kept = _create(name)
    kept.prune_intermediate_layers(1, prune_head=False)
    assert kept(x).shape == (2, 7)


@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_covers_every_parameter(shared, coarse):
    groups = group_parameters(shared, shared.group_matcher(coarse=coarse))
    names = [parameter for group in groups.values() for parameter in group]
    assert sorted(names) == sorted(parameter for parameter, _ in shared.named_parameters())
    assert all("stem" in parameter for parameter in groups[0])
    assert any("head" in parameter for parameter in groups[max(groups)])
    assert len(groups) >= len(shared.feature_info)


def test_weight_decay_groups(shared):
    spared = shared.no_weight_decay()
    assert spared <= {parameter for parameter, _ in shared.named_parameters()}
    without, with_decay = param_groups_weight_decay(shared, 0.1, no_weight_decay_list=spared)
    assert without["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in with_decay["params"])


def test_meta_device_then_weights(name, shared):
    model = _create(name, device="meta").eval()
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(shared.state_dict(), assign=True)
    x = _images()
    assert torch.equal(model(x), shared(x))


def test_dtype_argument(name):
    model = _create(name, dtype=torch.float64).eval()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model(_images().double()).dtype == torch.float64


def test_torch_fx_traces_it(shared):
    node = timm.models.get_graph_node_names(shared)[1][-1]
    extractor = timm.models.create_feature_extractor(shared, {node: "out"})
    x = _images()
    with torch.no_grad():
        assert torch.equal(extractor(x)["out"], shared(x))


def test_image_size_arguments_are_taken_and_change_nothing(name, shared):
    model = _create(name, img_size=48, dynamic_img_size=True)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shared.state_dict().items()}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(3, 32, 32), ValueError, r"images must have shape \(batch, 3, height, width\), got \(3, 32, 32\)"),
        (torch.zeros(1, 1, 32, 32), ValueError, r"got \(1, 1, 32, 32\)"),
        (torch.zeros(1, 3, 0, 32), ValueError, "at least one pixel"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "floating-point, got torch.uint8"),
        ("image.png", TypeError, "must be a torch.Tensor, got str"),
    ],
)
def test_bad_images(shared, bad, error, message):
    with pytest.raises(error, match=message):
        shared(bad)


def test_unknown_argument(name):
    with pytest.raises(TypeError, match="patch_size"):
        create_model(name, patch_size=4)
