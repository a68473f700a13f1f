"""CrossFormer: the published figures, the authors' figures (tests/golden/make_crossformer.py) and their checkpoints."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coterie.models import create_model
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


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameters_and_arithmetic_are_the_published_ones(variant):
    parameters, gmacs = PUBLISHED[variant]
    model = create_model(f"crossformer_{variant}", device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    for module in model.modules():  # inference computes position biases once, so they are no part of a forward pass
        if hasattr(module, "pos"):
            module.pos = None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.008)  # the published ones count norms too


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
