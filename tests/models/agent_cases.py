"""What the tests of the Agent models share: the figures that the authors' code gave, and their weights."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.models import create_model
from coterie.testing import generated_weights

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("make_agent", GOLDEN / "make_agent.py")
assert _spec is not None
assert _spec.loader is not None
make_agent = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_agent)


def figures_of(case: str) -> dict[str, Any]:
    """One file of figures."""
    return json.loads((GOLDEN / "agent" / f"{case}.json").read_text())


def authors_shapes(variant: str, size: int) -> dict[str, list[int]]:
    """Names and shapes of the authors' whole state."""
    lines = figures_of(f"{make_agent.VARIANTS[variant][0]}_shapes")
    return make_agent.unfolded(lines[f"{variant}_{size}"])


def authors_state(variant: str, size: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Generated weights under the authors' names; the buffers, which are dropped, are zeros."""
    shapes = authors_shapes(variant, size)
    return generated_weights(shapes.items(), make_agent.SEED, dtype=dtype)


def model_of(figures: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    """Our model of a case, with the weights that theirs had."""
    model = create_model(figures["variant"], img_size=figures["size"], device="meta", dtype=dtype).eval()
    state = authors_state(figures["variant"], figures["from_size"] or figures["size"])
    own, _ = model.from_authors(state)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in own.items()}, assign=True)
    return model


def closeness(ours: Tensor, theirs: Any) -> float:
    """The largest difference, over the largest of theirs."""
    expected = torch.tensor(theirs, dtype=torch.float64)
    return float((ours.double() - expected).abs().max() / expected.abs().max())


def check_figures(figures: dict[str, Any], logits: Tensor, maps: list[Tensor], tolerance: float) -> None:
    """Logits (1, classes) and maps (tokens, channels) are those of the authors."""
    assert closeness(logits[0, : len(figures["logits"])], figures["logits"]) <= tolerance
    assert len(maps) == len(figures["maps"])
    for ours, theirs in zip(maps, figures["maps"]):
        assert list(ours.shape) == theirs["shape"]
        assert closeness(ours.flatten()[theirs["places"]], theirs["values"]) <= tolerance
        assert closeness(ours.double().std(), theirs["std"]) <= tolerance
