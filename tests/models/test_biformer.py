"""BiFormer: its sizes, and figures that the authors' code gave (tests/golden/make_biformer.py says how)."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from coterie.attention import BiLevelRoutingAttention
from coterie.models import create_model, load_authors_checkpoint

FOLDER = Path(__file__).parents[1] / "golden"
SIZES = {
    "biformer_tiny": (13_142_760, 2.216),
    "biformer_small": (25_536_232, 4.464),
    "biformer_base": (56_804_968, 9.759),
    "biformer_stl": (28_372_552, 4.574),
}
SMALL = {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4), "num_classes": 7}
JUNK = 1e3  # what padding holds; nobody may look at it


def _golden():
    spec = importlib.util.spec_from_file_location("make_biformer", FOLDER / "make_biformer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _golden()
CASES = sorted(golden.CASES)


def figures_of(case):
    return json.loads((FOLDER / "biformer" / f"{case}.json").read_text())


def small(**options):
    torch.manual_seed(0)
    return create_model("biformer_tiny", **{**SMALL, "regions": (4, 4, 2, 1), **options})


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds(name):
    parameters, gmacs = SIZES[name]
    assert sum(p.numel() for p in create_model(name, device="meta").parameters()) == parameters
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        pytest.skip("the FLOP counter of this torch does not count attention on the CPU")
    with FakeTensorMode():
        model = create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=5e-4)


def ours_from(figures, dtype=torch.float64, **options):
    """Our model with the weights that the authors' network had."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in figures["ours"]["options"].items()}
    model = create_model(figures["ours"]["name"], device="meta", **{**settings, **options})
    theirs = golden.weights(((n, tuple(s)) for n, s in figures["shapes"].items()), dtype=dtype)
    tensors, dropped = model.from_authors(theirs)
    assert not dropped
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def watch_choices(model):
    """The choices of each block, as they will be made."""
    choices = []

    def look(module, inputs):
        assignment, selected = (x[0, 0] for x in module.groups_of(inputs[0]))
        choices.append(golden.choice(torch.stack([row.unique() for row in assignment[selected]])))

    for module in model.modules():
        if isinstance(module, BiLevelRoutingAttention) and module.regions > 1:
            module.register_forward_pre_hook(look)
    return choices


def assert_figures(found, expected, tolerance):
    found, expected = (torch.tensor(x, dtype=torch.float64) for x in (found, expected))
    assert float((found - expected).abs().max() / expected.abs().max()) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_ours_equals_the_authors(case):
    figures = figures_of(case)
    model = ours_from(figures)
    choices = watch_choices(model)
    with torch.no_grad():
        last, maps = model.forward_intermediates(golden.image(*figures["size"]))
        logits = model.forward_head(last)[0]
    assert choices == figures["choices"]  # a region that flips changes everything after it: look here first
    for ours, expected in zip(maps, figures["stages"], strict=True):
        got = golden.stage_figures(ours.contiguous())
        assert got["shape"] == expected["shape"]
        for figure in ("mean", "std"):
            assert got[figure] == pytest.approx(expected[figure], rel=1e-9, abs=1e-9)
        assert_figures(got["some"], expected["some"], 1e-10)
    assert_figures(golden.some(logits, 100), figures["logits"]["some"], 1e-10)


def test_where_regions_do_not_divide_the_map_nothing_is_padded_unless_asked_for():
    """Their padding changes the answer; without it ours is what the definition gives, token by token."""
    figures = figures_of("tiny_auto_pad")
    ours = ours_from(figures, uneven="balanced")
    with torch.no_grad():
        logits = torch.tensor(golden.some(ours(golden.image(*figures["size"]))[0], 100), dtype=torch.float64)
    assert not torch.allclose(logits, torch.tensor(figures["logits"]["some"], dtype=torch.float64), rtol=0.1)
    model, x = small().double().eval(), images(1, 3, 37, 50)
    with torch.no_grad():
        found = model(x)
        for module in model.modules():
            if isinstance(module, BiLevelRoutingAttention):
                module.backend = "reference"
        torch.testing.assert_close(model(x), found, rtol=1e-9, atol=1e-9)


def maps_of(model, x, mask=None):
    return model.forward_intermediates(x, intermediates_only=True, mask=mask)


def padded(x, rows, columns):
    """The images with junk below and to the right, and the mask."""
    height, width = x.shape[2:]
    canvas = x.new_full((*x.shape[:2], height + rows, width + columns), JUNK)
    canvas[:, :, :height, :width] = x
    mask = torch.zeros(len(x), height + rows, width + columns, dtype=torch.bool)
    mask[:, :height, :width] = True
    return canvas, mask


def images(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_same_inside(maps, alone):
    for got, expected in zip(maps, alone, strict=True):
        got = got[:, :, : expected.shape[2], : expected.shape[3]]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["convolutional", "swin"])
def test_features_inside_are_the_same_whatever_the_padding(layout):
    model = small(layout=layout).double().eval()
    x = images(2, 3, 37, 50)
    with torch.no_grad():
        alone = maps_of(model, x)
        assert [tuple(m.shape[2:]) for m in alone] == [(10, 13), (5, 7), (3, 4), (2, 2)]
        for rows, columns in [(0, 0), (1, 0), (0, 3), (9, 23), (40, 7)]:
            assert_same_inside(maps_of(model, *padded(x, rows, columns)), alone)
        expected = model.forward_features(x)
        assert_same_inside([model.forward_features(*padded(x, 8, 40))], [expected])


@pytest.mark.parametrize("layout", ["convolutional", "swin"])
def test_each_image_of_a_mixed_batch_is_as_alone(layout):
    model = small(layout=layout).double().eval()
    sizes = [(40, 30), (29, 39), (40, 39)]
    batch = torch.full((3, 3, 40, 39), JUNK, dtype=torch.float64)
    mask = torch.zeros(3, 40, 39, dtype=torch.bool)
    for row, (height, width) in enumerate(sizes):
        batch[row, :, :height, :width] = images(3, height, width, seed=row)
        mask[row, :height, :width] = True
    with torch.no_grad():
        together = maps_of(model, batch, mask)
        for row, (height, width) in enumerate(sizes):
            assert_same_inside(
                [m[row : row + 1] for m in together], maps_of(model, images(1, 3, height, width, seed=row))
            )


@pytest.mark.parametrize("layout", ["convolutional", "swin"])
def test_a_training_step_is_the_same_whatever_the_padding(layout):
    found = []
    for rows, columns in [(0, 0), (5, 30)]:
        model = small(layout=layout).double().train()
        canvas, mask = padded(images(3, 3, 37, 50), rows, columns)
        canvas.requires_grad_()
        last = model.forward_features(canvas, mask if rows else None)[:, :, :2, :2]
        (last * images(*last.shape, seed=9)).sum().backward()
        assert not canvas.grad[:, :, 37:].any()
        assert not canvas.grad[:, :, :, 50:].any()
        state = {n: b for n, b in model.named_buffers() if "running" in n}
        found.append({**state, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert "stem.norm1.running_mean" in found[0] or "stem.norm.running_mean" in found[0]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_an_image_that_is_all_padding_gives_finite_features():
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0] = True
    assert all(y.isfinite().all() for y in maps_of(small().double().eval(), images(2, 3, 32, 32), mask))


def test_small_images_need_fewer_regions_and_are_told_so():
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"at least regions=7 tokens along each side, got 4 x 4: .* fewer regions"):
        small(regions=7).eval()(x)
    assert small(regions=(4, 4, 2, 1)).eval()(x).shape == (1, 7)
    assert small(regions=7).eval()(torch.randn(1, 3, 97, 97)).shape == (1, 7)
    with pytest.raises(ValueError, match="got 6 x 7"):
        small(regions=7).eval()(torch.randn(1, 3, 96, 97))


def test_regions_and_top_k_of_each_stage():
    def chosen(**options):
        return [(m.regions, m.top_k) for m in small(**options).modules() if isinstance(m, BiLevelRoutingAttention)]

    assert chosen(regions=7) == [(7, 1), (7, 4), (7, 16), (7, 16), (1, 1)]
    assert chosen(regions=(4, 4, 2, 1)) == [(4, 1), (4, 4), (2, 4), (2, 4), (1, 1)]  # all four, where there are four
    assert chosen(regions=2, top_k=(1, 2, 3, 4)) == [(2, 1), (2, 2), (2, 3), (2, 3), (2, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": (1, 4, 16, None)}, r"regions x regions = 2 x 2 = 4, got 16"),
        ({"top_k": (1, 4)}, r"top_k must have one number for each of 4 stages, got 2: \[1, 4\]"),
        ({"regions": (7, 7)}, r"regions must have one number for each of 4 stages, got 2: \[7, 7\]"),
        ({"regions": 0}, "each of regions must be at least 1, got 0"),
        ({"layout": "pvt"}, "layout must be one of 'convolutional', 'swin', got 'pvt'"),
        ({"uneven": "crop"}, "uneven must be one of 'balanced', .*, got 'crop'"),
        ({"global_lepe_of": "key"}, "lepe_of must be one of 'value', 'input', got 'key'"),
        ({"scale": "none"}, "scale must be one of 'head', 'dim', got 'none'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize("case", ["tiny", "small", "base", "stl", "stl_nchw"])
def test_the_authors_checkpoints_have_a_place_for_every_key(case):
    figures = figures_of(case)
    theirs = {n: torch.empty(s, device="meta") for n, s in figures["shapes"].items()}
    model = create_model(figures["ours"]["name"], device="meta", **figures["ours"]["options"])
    tensors, dropped = model.from_authors(theirs)
    assert not dropped
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_a_checkpoint_loads_and_another_variants_is_refused(tmp_path):
    figures = figures_of("tiny")
    weights = golden.weights(((n, tuple(s)) for n, s in figures["shapes"].items()), dtype=torch.float32)
    torch.save({"model": weights, "epoch": 1}, tmp_path / "tiny.pth")
    save_file({**weights, "extra.weight": torch.zeros(1)}, tmp_path / "extra.safetensors")
    model = create_model("biformer_tiny")
    report = load_authors_checkpoint(model, tmp_path / "tiny.pth")
    assert (report.used, report.dropped) == (len(weights), {})
    assert torch.equal(model.stages[2].blocks[3].attn.qkv.weight, weights["stages.2.3.attn.qkv.qkv.weight"])
    assert torch.equal(model.stages[3].blocks[1].attn.lepe.weight, weights["stages.3.1.attn.lepe.weight"])
    with pytest.raises(ValueError, match=r"not a checkpoint of this BiFormer: .* have no place \(extra.weight\)"):
        load_authors_checkpoint(model, tmp_path / "extra.safetensors")
    for other, message in [("small", "parameters stay empty"), ("stl", "parameters stay empty .* have no place")]:
        with pytest.raises(ValueError, match=message):
            load_authors_checkpoint(create_model(f"biformer_{other}", device="meta"), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"head\.fc\.\w+ has shape \(1000"):
        load_authors_checkpoint(create_model("biformer_tiny", num_classes=10, device="meta"), tmp_path / "tiny.pth")


def test_weights_of_the_refactored_code_want_a_model_built_for_them():
    both = {
        case: {n: torch.empty(s, device="meta") for n, s in figures_of(case)["shapes"].items()}
        for case in ("stl", "stl_nchw")
    }
    with pytest.raises(
        ValueError, match=r"refactored \('nchw'\) code, .* create the model with global_lepe_of='value'"
    ):
        create_model("biformer_stl", device="meta").from_authors(both["stl_nchw"])
    with pytest.raises(ValueError, match=r"first code, .* create the model with global_lepe_of='input', got 'value'"):
        create_model("biformer_stl", device="meta", global_lepe_of="value").from_authors(both["stl"])


def test_it_compiles_in_one_graph_and_runs_in_half_precision():
    model, x = small().eval(), torch.randn(2, 3, 40, 33)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)
    assert half.isfinite().all()


def test_maps_are_channels_last_without_copies():
    for stage in maps_of(small().double().eval(), images(1, 3, 40, 33)):
        assert stage.is_contiguous(memory_format=torch.channels_last)


def test_dgt_takes_the_mechanism_with_the_same_parameters():
    options = [{"regions": side, "top_k": k} for side, k in ((4, 2), (4, 4), (2, 4), (1, 1))]
    model = create_model("dgt_nano", num_classes=7, attention="bi_level_routing", attention_options=options).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    plain = create_model("dgt_nano", num_classes=7, device="meta")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


def test_an_exported_program_gives_the_same():
    model, x = small().eval(), torch.randn(1, 3, 40, 33)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"), [({"regions": 7.0}, "must be an int"), ({"top_k": 4}, "per stage, got 4")]
)
def test_options_of_another_type(options, message):
    with pytest.raises(TypeError, match=message):
        small(**options)
