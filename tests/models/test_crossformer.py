"""CrossFormer: the published figures, the authors' figures (tests/golden/make_crossformer.py) and their checkpoints."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from coterie.models import create_model
from coterie.models.authors import load_authors_checkpoint
from coterie.testing import generated_tensor, generated_weights

FOLDER = Path(__file__).parents[1] / "golden" / "crossformer"
PUBLISHED = {  # parameters, GMACs at 224 x 224
    "tiny": (27_776_794, 2.870),
    "small": (30_657_394, 4.925),
    "base": (51_971_554, 9.188),
    "large": (91_971_184, 16.146),
    "pp_small": (23_325_340, 4.451),
    "pp_base": (51_994_594, 9.626),
    "pp_large": (92_001_904, 16.768),
    "pp_huge": (95_962_944, 22.073),
}
NARROW = {"dims": (16, 32, 48, 64), "depths": (1, 2, 4, 2), "num_heads": (1, 2, 3, 4), "num_classes": 5}
SMALL_GROUPS = {"group_size": (3, 4, 3, 2), "interval": (4, 2, 2, 1)}


def unfold(folded):
    """`fold` of make_crossformer.py undone."""
    shapes = {}
    for name, shape in folded.items():
        before, first, last, after = re.fullmatch(r"(.*blocks\.|)(?:(\d+)-(\d+))?(.*)", name).groups()
        for block in range(int(first or 0), int(last or 0) + 1):
            shapes[before + (str(block) if first else "") + after] = shape
    return shapes


def figures_of(case):
    return json.loads((FOLDER / f"{case}.json").read_text())


def authors_keys(age, variant):
    return unfold(figures_of(f"keys_{age}")[variant])


def small(name="crossformer_pp_small", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, **{**NARROW, **SMALL_GROUPS, **options})


@cache
def meta_model(variant):
    """A model without memory, for tests that look at names and shapes."""
    return create_model(f"crossformer_{variant}", device="meta")


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_are_the_published_ones(variant):
    assert sum(p.numel() for p in meta_model(variant).parameters()) == PUBLISHED[variant][0]


@pytest.mark.parametrize("variant", ["tiny", "large", "pp_small"])
def test_arithmetic_is_the_published_one(variant):
    model = create_model(f"crossformer_{variant}", device="meta").eval()
    for module in model.modules():  # inference computes position biases once, so they are no part of a forward pass
        if hasattr(module, "pos"):
            module.pos = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[variant][1], rel=0.008)  # those count norms too


def golden_model(case, **options):
    figures = figures_of(case)
    depths = {"depths": figures["depths"]}
    model = create_model(f"crossformer_{figures['variant']}", **depths, **options, dtype=torch.float64).eval()
    tensors, dropped = model.from_authors(generated_weights(unfold(figures["shapes"]).items(), figures["seed"]))
    assert not dropped
    model.load_state_dict(tensors)
    return model, figures


def golden_error(model, figures):
    """The largest difference of logits and stage maps from the authors' figures, relative to their size."""
    height, width = figures["image_size"]
    image = generated_tensor("image", (1, 3, height, width), figures["seed"]) * (3 * height * width) ** 0.25
    with torch.no_grad():
        final, maps = model.forward_intermediates(image.to(next(model.parameters()).dtype))
        logits = model.forward_head(final)[0]
    tokens = [x[0].permute(1, 2, 0).flatten().double() for x in maps]
    pairs = [(logits.double()[::20], figures["logits"])]
    pairs += [(x[:: x.numel() // 25], map["values"]) for x, map in zip(tokens, figures["maps"], strict=True)]
    pairs += [(torch.stack([x.mean(), x.std()]), [map["mean"], map["std"]]) for x, map in zip(tokens, figures["maps"])]
    wanted = [torch.tensor(want, dtype=torch.float64) for _, want in pairs]
    return max(float((got - want).abs().max() / want.abs().max()) for (got, _), want in zip(pairs, wanted))


AUTHORS_CASES = {
    "tiny_224": {},
    "small_224": {},
    "pp_small_224": {},
    "uneven": {},
    "pp_uneven": {},
    "small_grid": {"small_grids": "shorter_side"},
    "older_growing": {"small_grids": "shorter_side", "interval": "growing"},
}


@pytest.mark.parametrize("case", AUTHORS_CASES)
def test_ours_equals_the_authors(case):
    model, figures = golden_model(case, **AUTHORS_CASES[case])
    assert golden_error(model, figures) <= 1e-10
    if figures["depths"][0] > 1:  # the small ones also as people run them
        assert golden_error(model.float(), figures) <= 1e-4


@pytest.mark.parametrize("case", ["small_grid", "older_growing"])
def test_the_authors_grouping_of_small_and_large_grids_is_an_option(case):
    assert golden_error(*golden_model(case)) > 1e-3


@pytest.mark.parametrize(
    ("age", "variant"),
    [("newer", v) for v in PUBLISHED] + [("older", v) for v in PUBLISHED if not v.startswith("pp_")],
)
@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_every_published_checkpoint_finds_its_place(variant, age, tmp_path):
    shapes = authors_keys(age, variant)
    checkpoint = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}  # a file of a few kilobytes
    torch.save({"model": checkpoint}, tmp_path / "authors.pth")
    model = meta_model(variant)
    loaded = load_authors_checkpoint(model, tmp_path / "authors.pth")
    assert loaded.used == len(list(model.parameters()))
    assert len(loaded.dropped) == len(shapes) - loaded.used
    assert all(name.endswith(("biases", "relative_position_index")) for name in loaded.dropped)
    assert bool(loaded.dropped) == (age == "older")
    assert all("when it is needed" in why for why in loaded.dropped.values())


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_another_variants_checkpoint_is_one_error_that_names_both_sides(tmp_path):
    state = {name: torch.zeros(()).expand(shape) for name, shape in authors_keys("newer", "small").items()}
    torch.save(state, tmp_path / "small.pth")
    for variant, text in [
        ("base", "parameters stay empty .*blocks.10.*another variant"),
        ("tiny", "tensors have no place .*another variant"),
        ("pp_base", "parameters stay empty"),
    ]:
        with pytest.raises(ValueError, match=f"small.pth: not a checkpoint of this CrossFormer: .*{text}"):
            load_authors_checkpoint(meta_model(variant), tmp_path / "small.pth")
    model = create_model("crossformer_small", device="meta", num_classes=5)
    with pytest.raises(ValueError, match=r"head.fc.weight has shape \(1000, 768\) in the file and \(5, 768\)"):
        load_authors_checkpoint(model, tmp_path / "small.pth")


def test_a_checkpoint_is_loaded_value_by_value(tmp_path):
    model, figures = golden_model("small_grid", small_grids="shorter_side")
    theirs = generated_weights(unfold(figures["shapes"]).items(), 5)
    save_file(theirs, tmp_path / "authors.safetensors")
    load_authors_checkpoint(model, tmp_path / "authors.safetensors")
    state = model.state_dict()
    assert torch.equal(state["stages.1.downsample.projs.0.weight"], theirs["layers.0.downsample.reductions.0.weight"])
    assert torch.equal(
        state["stages.3.blocks.1.attn.pos.pos3.2.bias"], theirs["layers.3.blocks.1.attn.pos.pos3.2.bias"]
    )


def test_parts_are_where_the_papers_have_them():
    model = meta_model("pp_huge")
    assert [proj.out_channels for proj in model.stem.projs] == [64, 32, 16, 16]
    assert [proj.kernel_size[0] for proj in model.stem.projs] == [4, 8, 16, 32]
    assert [proj.padding[0] for proj in model.stem.projs] == [0, 2, 6, 14]
    cooled = [[i for i, block in enumerate(stage.blocks) if block.cooling is not None] for stage in model.stages]
    assert cooled == [[2], [2], [2, 5, 8, 11, 14], []]  # after every third block, but not the last of a stage
    kinds = [[block.attn.long_distance for block in stage.blocks] for stage in model.stages]
    assert kinds == [[i % 2 == 1 for i in range(depth)] for depth in (6, 6, 18, 2)]
    plain = meta_model("tiny")
    assert all(block.cooling is None for stage in plain.stages for block in stage.blocks)
    hidden = plain.stages[0].blocks[0].attn.pos.pos_proj.out_features
    assert hidden == 64 // 16


def images(height, width, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, height, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("options", [{}, {"interval": "growing"}, {"small_grids": "shorter_side"}])
def test_padding_changes_nothing_inside_an_image(options):
    model = small(**options, dtype=torch.float64).eval()
    sizes = [(37, 50), (64, 21), (5, 64)]
    batch = torch.full((3, 3, 64, 64), 1e3, dtype=torch.float64)
    mask = torch.zeros(3, 64, 64, dtype=torch.bool)
    single = [images(*size, batch=1) for size in sizes]
    for row, ((height, width), image) in enumerate(zip(sizes, single)):
        batch[row, :, :height, :width] = image[0]
        mask[row, :height, :width] = True
    together = model.forward_intermediates(batch, intermediates_only=True, mask=mask)
    for row, image in enumerate(single):
        for got, alone in zip(together, model.forward_intermediates(image, intermediates_only=True)):
            inside = got[row : row + 1, :, : alone.shape[2], : alone.shape[3]]
            torch.testing.assert_close(inside, alone, rtol=1e-9, atol=1e-9)


def test_gradients_do_not_reach_padding_and_checkpointing_changes_nothing():
    grads = []
    for frugal in (False, True):
        model = small(dtype=torch.float64).train()
        model.set_grad_checkpointing(frugal)
        canvas = images(48, 40).requires_grad_()
        mask = torch.zeros(2, 48, 40, dtype=torch.bool)
        mask[:, :37, :30] = True
        model.forward_features(canvas, mask)[:, :, :1, :1].square().mean().backward()
        assert not canvas.grad[:, :, 37:].any()
        assert not canvas.grad[:, :, :, 30:].any()
        assert canvas.grad[:, :, :37, :30].any()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_inference_by_rows_is_the_same_and_steps_aside_for_hooks(monkeypatch):
    monkeypatch.setattr("coterie.layers.by_rows.ROWS", 7)
    model, x, calls = small(dtype=torch.float64).eval(), images(40, 56), []
    expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        fc1 = model.stages[0].blocks[0].mlp.fc1
        forward = fc1.forward
        fc1.forward = lambda tokens: calls.append(tokens.shape) or forward(tokens)
        model(x)
        assert (7, 16) in calls
        seen = []
        hook = fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        torch.testing.assert_close(model(x), expected)
        hook.remove()
    assert seen == [(2, 10, 14, 64)]


def test_large_kernels_in_cells_are_the_same_convolutions():
    model = small(dtype=torch.float64)
    x = images(44, 52)
    expected = torch.cat([proj(x) for proj in model.stem.projs], 1)
    y = model.stem.norm(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.stem(x), y)
    weights = [proj.weight for proj in model.stem.projs]
    got = torch.autograd.grad(model.stem(x).square().mean(), weights)
    for one, other in zip(got, torch.autograd.grad(y.square().mean(), weights)):
        torch.testing.assert_close(one, other)


def test_it_compiles_and_runs_in_bfloat16():
    model, x = small(depths=(2, 1, 1, 1)).eval(), images(40, 56).float()
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"group_size": (7, 7)}, r"group_size must have one entry per stage, 4, got 2: \(7, 7\)"),
        ({"interval": (8, 4, 2)}, "interval must have one entry per stage, 4, got 3"),
        ({"interval": "fixed"}, "interval must be one of 'growing', got 'fixed'"),
        (
            {"dims": (12, 24, 48, 96), "num_heads": (1, 2, 4, 8)},
            "a multiple of 8, as the stem's kernels share it, got 12",
        ),
        ({"small_grids": "no"}, "small_grids must be one of"),
        ({"drop_path_rate": 1.5}, "drop_path_rate must be at least 0 and below 1"),
    ],
)
def test_options_that_do_not_fit(options, text):
    with pytest.raises(ValueError, match=text):
        create_model("crossformer_tiny", **options)
