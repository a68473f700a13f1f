"""LITv2: parameters and arithmetic of the paper's sizes, the authors' figures and checkpoints, masks, and pieces."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from coterie.models import create_model, litv2, load_authors_checkpoint
from coterie.models.litv2 import ConvFeedForward, DeformableTokenMerging
from coterie.testing import generated_tensor, generated_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "litv2"
PARAMETERS = {"litv2_small": 27_844_000, "litv2_medium": 48_830_368, "litv2_base": 86_520_704}
# Their counter adds LayerNorms, biases of convolutions and 4 offset channels that do not exist: 0.3 % more than ours.
GMACS = {"litv2_small": 3.734, "litv2_medium": 7.479, "litv2_base": 13.194, "litv2_base_384": 39.709}
NARROW = {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "num_classes": 5}


def figures_of(case):
    return json.loads((GOLDEN / f"{case}.json").read_text())


def theirs(figures):
    """The weights that the authors' model had."""
    weights = generated_weights(figures["shapes"].items(), figures["seed"])
    for name, tensor in weights.items():
        if name.endswith("running_var"):
            weights[name] = tensor.abs() + 0.5
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
    return weights


def narrow(seed=0, **options):
    """A small one whose offsets are large and whose batch normalisations have seen something."""
    torch.manual_seed(seed)
    model = create_model("litv2_small", **{**NARROW, **options}).double()
    for module in model.modules():
        if isinstance(module, DeformableTokenMerging):
            torch.nn.init.normal_(module.offset.weight, std=0.3)
            torch.nn.init.uniform_(module.norm.running_var, 0.5, 2)
            torch.nn.init.normal_(module.norm.running_mean)
    return model.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_is(x, digest):
    assert list(x.shape) == digest["shape"]
    torch.testing.assert_close(x.flatten()[digest["places"]].tolist(), digest["values"], rtol=1e-9, atol=1e-10)
    assert float(x.mean()) == pytest.approx(digest["mean"], rel=1e-8)
    assert float(x.std()) == pytest.approx(digest["std"], rel=1e-8)


@pytest.mark.parametrize("name", GMACS)
def test_parameters_and_multiply_adds(name):
    model = create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name.removesuffix("_384")]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.pretrained_cfg["input_size"], device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name], rel=4e-3)
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 6 if name == "litv2_small" else 18, 2]
    split = {(b.attn.hi_heads, b.attn.lo_heads, b.attn.window_size) for b in model.stages[2].blocks}
    assert split == {(2, 14 if "base" in name else 10, 2)}
    assert all(b.attn is None for stage in model.stages[:2] for b in stage.blocks)


@pytest.mark.parametrize("variant", ["small", "base"])  # medium is small with more blocks, and a test takes seconds
def test_it_equals_the_authors_at_their_size(variant):
    figures = figures_of(variant)
    model = create_model(f"litv2_{variant}", device="meta", dtype=torch.float64).eval()
    tensors, dropped = model.from_authors(theirs(figures))
    model.load_state_dict(tensors, strict=True, assign=True)
    assert dropped == {}
    x = generated_tensor("images", (1, 3, *figures["size"]), figures["seed"]) * 16
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        logits = model.forward_head(features)
    torch.testing.assert_close(logits[0, ::8].tolist(), figures["logits"], rtol=1e-9, atol=1e-10)
    for x, digest in zip(maps, figures["stages"], strict=True):
        assert_is(x, digest)


def test_it_equals_the_authors_dense_backbone_at_an_odd_size_by_their_way_of_padding():
    figures = figures_of("small_dense_75x107")
    model, ours = (
        create_model("litv2_small", uneven=uneven, num_classes=0, device="meta").eval()
        for uneven in ("authors", "padded")
    )
    weights = model.from_authors(theirs(figures))[0]
    for one in (model, ours):
        missing, unexpected = one.load_state_dict(weights, strict=False, assign=True)
        assert (missing, unexpected) == (["norm.weight", "norm.bias"], [])
    x = generated_tensor("images", (1, 3, *figures["size"]), figures["seed"]) * 16
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
        for y, digest in zip(maps, figures["stages"], strict=True):
            assert_is(y, digest)
        other = ours.forward_intermediates(x, intermediates_only=True)
    assert [tuple(y.shape[2:]) for y in maps] == [(19, 27), (9, 13), (4, 6), (2, 3)]
    assert [tuple(y.shape[2:]) for y in other] == [(19, 27), (10, 14), (5, 7), (3, 4)]
    assert torch.equal(other[0], maps[0])  # nothing is merged or attended to yet
    torch.testing.assert_close(other[1][:, :, :7, :11], maps[1][:, :, :7, :11])  # two convolutions inside


def test_both_ways_are_the_same_where_sizes_divide():
    model, dense = narrow(), narrow(uneven="authors")
    dense.load_state_dict(model.state_dict())
    x = images(2, 3, 64, 96)
    assert torch.equal(model(x), dense(x))
    with pytest.raises(ValueError, match="uneven='authors' lets padding take part, so it takes no mask"):
        dense.forward_features(x, torch.ones(2, 64, 96, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"merges maps of at least 2 x 2 tokens, got \(1, 8\)"):
        dense(images(1, 3, 4, 32))


@pytest.mark.parametrize(
    ("height", "width", "train"), [(41, 59, False), (33, 64, False), (3, 7, False), (41, 59, True), (33, 64, True)]
)
def test_the_maps_inside_a_mask_do_not_depend_on_what_is_outside(height, width, train):
    """With offsets of several tokens, which reach over the border, and statistics of batches in training."""
    model = narrow().train(train)
    x = images(1, 3, height, width)
    alone = model.forward_intermediates(x, intermediates_only=True, norm=True)
    for seed in (2, 3):
        larger = 100 * images(1, 3, 72, 80, seed=seed)
        larger[:, :, :height, :width] = x
        mask = torch.zeros(1, 72, 80, dtype=torch.bool)
        mask[:, :height, :width] = True
        maps = model.forward_intermediates(larger, intermediates_only=True, norm=True, mask=mask)
        for inside, whole in zip(alone, maps, strict=True):
            torch.testing.assert_close(whole[:, :, : inside.shape[2], : inside.shape[3]], inside)
    offsets = [m.offset(images(1, m.offset.in_channels, 8, 8)) for m in model.modules() if hasattr(m, "offset")]
    assert all(o.abs().max() > 1 for o in offsets)


@pytest.mark.parametrize("variant", ["small", "medium", "base"])
@pytest.mark.filterwarnings("ignore:for .*meta parameter")
def test_an_authors_checkpoint_loads_and_another_variants_does_not(variant, tmp_path):
    shapes = figures_of(variant)["shapes"]
    file = tmp_path / "theirs.pth"
    torch.save({"model": {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}}, file)
    model = create_model(f"litv2_{variant}", device="meta")
    report = load_authors_checkpoint(model, file)
    assert (report.used, report.dropped) == (len(shapes), {})
    assert {
        name: list(t.shape) for name, t in model.from_authors(model.state_dict())[0].items()
    }  # ours stay as they are
    wrong = {"small": "medium", "medium": "base", "base": "small"}[variant]
    with pytest.raises(ValueError, match="not a checkpoint of this LITv2"):
        load_authors_checkpoint(create_model(f"litv2_{wrong}", device="meta"), file)


def test_merging_is_an_ordinary_convolution_at_first_and_folds_its_normalisation_in_evaluation():
    torch.manual_seed(0)
    merge = DeformableTokenMerging(6, 10).double()
    x = images(2, 6, 8, 10).contiguous(memory_format=torch.channels_last)
    plain = F.gelu(merge.norm(merge.conv(x)))
    torch.testing.assert_close(merge(x).permute(0, 3, 1, 2), plain)
    torch.nn.init.normal_(merge.offset.weight)
    merge.eval()
    folded = merge(x)
    merge.norm.train()
    merge.norm.momentum = 0.0
    merge.norm.forward = lambda y: F.batch_norm(
        y, merge.norm.running_mean, merge.norm.running_var, merge.norm.weight, merge.norm.bias, eps=merge.norm.eps
    )
    torch.testing.assert_close(merge(x), folded)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 6, 8), (2, 37, 9, 8), (1, 1, 1, 8)])
def test_a_feed_forward_in_pieces_gives_what_it_gives_as_a_whole(shape, masked, monkeypatch):
    torch.manual_seed(0)
    network, x = ConvFeedForward(8, 32).double(), images(*shape)
    mask = images(*shape[:3], seed=2) > 0 if masked else None
    whole = network(x, mask)  # with gradients there are no pieces
    for rows in (9, 12, 1000):
        monkeypatch.setattr(litv2, "PIECE", rows * shape[2] * 32 * 8)
        with torch.no_grad():
            torch.testing.assert_close(network(x, mask), whole)


def test_maps_stay_channels_last_and_tokens_are_not_copied():
    maps = narrow().forward_intermediates(images(2, 3, 40, 56), intermediates_only=True)
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


def test_initial_weights():
    torch.manual_seed(0)
    model = create_model("litv2_small", depths=(1, 1, 1, 1))
    block, merge = model.stages[2].blocks[0], model.stages[2].downsample
    assert 0.018 < block.attn.l_q.weight.std() < 0.021
    assert float(block.mlp.dwconv.weight.std()) == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    for zero in (block.attn.l_q.bias, block.mlp.dwconv.bias, merge.offset.weight, merge.offset.bias):
        assert not zero.any()
    assert float(merge.conv.weight.abs().max()) == pytest.approx((192 * 4) ** -0.5, rel=0.01)


def test_torch_compile_in_one_graph():
    model, x = narrow().float().train(), images(2, 3, 37, 64).float()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_half_precision_and_autocast():
    model, x = narrow().float(), images(2, 3, 40, 72).float()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(x)
        half = model.bfloat16()(x.bfloat16())
    for y in (mixed, half):
        assert y.dtype == torch.bfloat16
        assert (y.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window_size": (2, 1)}, ValueError, r"window_size must have one entry per stage, 4, got \(2, 1\)"),
        ({"window_size": 2}, ValueError, "window_size must have one entry per stage, 4, got 2"),
        ({"window_size": (0, 0, -1, 1)}, ValueError, "each of window_size must be at least 0, got -1"),
        ({"uneven": "crop"}, ValueError, "uneven must be one of 'padded', 'authors', got 'crop'"),
        ({"alpha": 2.0}, ValueError, "alpha must be from 0"),
        ({"dims": (96, 192)}, ValueError, "one entry per stage each"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        create_model("litv2_small", device="meta", **options)
