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
        tokens = assignment.numel()
        region = torch.cat([assignment, assignment.new_full((int(selected.max()) + 1,), -1)])
        chosen = region[selected]
        first = [row[(selected[i] < tokens) & (row >= 0)].unique() for i, row in enumerate(chosen)]
        choices.append(golden.choice(torch.stack(first)))

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
