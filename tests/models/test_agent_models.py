"""All Agent models: sizes of the paper, the authors' checkpoints, images of any size, padding."""

import pytest
import torch
from agent_cases import authors_shapes, authors_state, make_agent
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coterie.models import create_model, load_authors_checkpoint

# Parameters, and billions of operations as fvcore counts the authors' code (the paper's table, before rounding).
PUBLISHED = [
    ("agent_deit_tiny", 224, 6_015_640, 1.176),
    ("agent_deit_small", 224, 22_647_112, 4.443),
    ("agent_deit_base", 224, 87_204_904, 17.552),
    ("agent_deit_small", 448, 23_070_472, 17.705),
    ("agent_pvt_tiny", 224, 11_570_352, 2.000),
    ("agent_pvt_small", 224, 20_635_066, 3.978),
    ("agent_pvt_medium", 224, 35_921_746, 7.035),
    ("agent_pvt_large", 224, 48_738_180, 10.390),
    ("agent_pvt_medium", 256, 36_083_682, 9.189),
    ("agent_swin_tiny", 224, 28_902_964, 4.528),
    ("agent_swin_small", 224, 49_666_684, 8.733),
    ("agent_swin_small", 288, 49_707_964, 14.586),
    ("agent_swin_base", 224, 88_095_096, 15.444),
    ("agent_swin_base", 384, 88_305_016, 46.337),
    ("agent_cswin_tiny", 224, 20_458_672, 4.315),
    ("agent_cswin_small", 224, 32_814_100, 6.778),
    ("agent_cswin_base", 224, 73_249_696, 14.923),
    ("agent_cswin_base", 384, 73_328_416, 46.333),
]


def counted(model: nn.Module, size: int) -> float:
    """Billions of operations as fvcore counts them: products, and beside them 5 for each number that a LayerNorm
    gives, 4 for one that is interpolated, 1 for one that is averaged."""
    beside = 0

    def norm(module, args, output):
        nonlocal beside
        beside += 5 * output.numel()

    def attention(module, args, output):
        nonlocal beside
        heads, agents = module.key_bias.table.shape[:2]
        prefix, tokens = module.prefix_tokens, output[0].numel() // module.dim
        beside += 2 * 4 * heads * agents * (tokens - prefix) + (tokens - prefix) * module.dim

    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(norm)
        elif getattr(module, "key_bias", None) is not None:
            module.register_forward_hook(attention)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.zeros(1, 3, size, size, device="meta"))
    return (flops.get_total_flops() / 2 + beside) / 1e9


@pytest.mark.parametrize(("name", "size", "parameters", "billions"), PUBLISHED)
def test_published_models(name, size, parameters, billions):
    """Parameters and operations are the paper's, and every tensor of the authors' checkpoint finds its place."""
    model = create_model(name, img_size=size, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    state = {key: torch.empty(shape, device="meta") for key, shape in authors_shapes(name, size).items()}
    own, dropped = model.from_authors(state)
    assert {key: tensor.shape for key, tensor in own.items()} == {k: t.shape for k, t in model.state_dict().items()}
    assert all(key.endswith(("relative_position_index", "attn_mask")) for key in dropped)
    assert all(reason == "computed here from the sizes" for reason in dropped.values())
    assert counted(model, size) == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("agent_pvt_tiny", "agent_pvt_small", "tensors have no place"),
        ("agent_swin_tiny", "agent_swin_small", "parameters stay empty .* and .* tensors have no place"),
        ("agent_deit_tiny", "agent_deit_small", "in the file and .* in the model"),
        ("agent_pvt_tiny", "agent_deit_tiny", "not a checkpoint of this AgentPVT"),
    ],
)
def test_a_checkpoint_of_another_variant_is_refused(tmp_path, name, other, message):
    state = {key: torch.empty(0).expand(*shape[:-1], 0) if 0 in shape else torch.zeros(1).expand(shape)
             for key, shape in authors_shapes(other, 224).items()}  # fmt: skip
    torch.save({"model": state}, tmp_path / "other.pth")
    model = create_model(name, device="meta")
    with pytest.raises(ValueError, match=message):
        load_authors_checkpoint(model, tmp_path / "other.pth")


SMALL = {
    "agent_swin_tiny": {"dims": (12, 24, 36, 48), "depths": (1, 1, 2, 2), "num_heads": (1, 2, 3, 4),
                        "agents": (3, 3, 2, 2), "agent_blocks": (1, 1, 1, 0), "img_size": 64, "window_size": 2},
    "agent_pvt_tiny": {"dims": (12, 24, 36, 48), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4),
                       "agents": (3, 3, 2, 2), "img_size": 64},
    "agent_cswin_tiny": {"dims": (12, 24, 36, 48), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4),
                         "agents": (3, 3, 2, 2), "stripe_width": 2, "img_size": 64},
}  # fmt: skip


def small(name, **kwargs):
    torch.manual_seed(0)
    return create_model(name, num_classes=5, **{**SMALL[name], **kwargs}).double().eval()


def images(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SMALL)
def test_padding_changes_nothing_inside(name):
    """An image in a padded batch gives what it gives alone, of whatever size it is."""
    model, x = small(name), images(1, 3, 39, 75)
    batch, mask = images(2, 3, 64, 80, seed=2), torch.zeros(2, 64, 80, dtype=torch.bool)
    batch[0, :, :39, :75] = x[0]
    mask[0, :39, :75] = True
    mask[1] = True
    with torch.no_grad():
        alone = model.forward_intermediates(x, intermediates_only=True)
        padded = model.forward_intermediates(batch, intermediates_only=True, mask=mask)
        whole = model.forward_intermediates(batch[1:], intermediates_only=True)
    for one, both, other in zip(alone, padded, whole):
        torch.testing.assert_close(both[:1, :, : one.shape[2], : one.shape[3]], one)
        torch.testing.assert_close(both[1:], other)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 5), (30, 130)])
def test_any_size(name, height, width):
    model = small(name)
    assert model(images(1, 3, height, width)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_images_that_are_not_square_may_be_what_it_is_built_for(name):
    """Built for 64 x 96, and with the tables of 64 x 64 resized to it while running: the same at 64 x 64."""
    model = small(name, img_size=(64, 96))
    lines = [m.lines for m in model.modules() if type(m).__name__ == "AgentBias"]
    assert [len(axis) for axis in lines[0]] == [1, 1]
    assert [axis.shape[2] for axis in lines[0]] == [16, 24]
    assert model(images(1, 3, 64, 96)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_weights_of_one_size_run_at_another_as_if_resized(name):
    """Interpolated while running: exactly what resized tables give (without tables of windows, which stay)."""
    options = {"agent_blocks": (1, 1, 2, 2)} if name == "agent_swin_tiny" else {}
    model = small(name, **options)
    state = model.state_dict()
    other = small(name, **options, img_size=(96, 64))
    wanted = other.state_dict()
    for key, value in state.items():
        if "_bias.lines." in key:
            state[key] = nn.functional.interpolate(value, size=wanted[key].shape[2], mode="linear")
        elif key.endswith("position"):
            before, after = (
                stage.downsample.size for m in (model, other) for stage in [m.stages[int(key.split(".")[1])]]
            )
            table = value.transpose(1, 2).unflatten(2, before)
            state[key] = nn.functional.interpolate(table, size=after, mode="bilinear").flatten(2).transpose(1, 2)
    other.load_state_dict(state)
    x = images(1, 3, 96, 64)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("name", SMALL)
def test_reduced_precision_and_autocast(name):
    model, x = small(name).float(), images(2, 3, 64, 64).float()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


def test_it_compiles_in_one_graph():
    two = {"dims": (12, 24), "depths": (1, 1), "num_heads": (1, 2), "agents": 2, "agent_blocks": (1, 0)}
    model, x = small("agent_swin_tiny", **two), images(1, 3, 64, 64)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("agent_pvt_tiny", {"img_size": (64, 64, 64)}, r"img_size must be one number or \(height, width\), got"),
        ("agent_pvt_tiny", {"img_size": 0}, "img_size must be at least 1, got 0"),
        ("agent_pvt_tiny", {"agents": (3, 3)}, "agents must have one number for each of 4 stages, got 2"),
        ("agent_pvt_tiny", {"mlp_ratio": (8, 0, 4, 4)}, "each of mlp_ratio must be at least 1, got 0"),
        ("agent_swin_tiny", {"agent_blocks": (1, 1, -1, 0)}, "each of agent_blocks must be at least 0, got -1"),
        ("agent_swin_tiny", {"window_size": 0}, "window_size must be at least 1, got 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        small(name, **options)


def test_the_generated_weights_cover_their_state():
    state = authors_state("agent_swin_tiny", 224)
    assert len(state) == len(authors_shapes("agent_swin_tiny", 224)) > 200
    assert make_agent.folded(authors_shapes("agent_swin_tiny", 224))
