"""How strongly heads compose: figures that follow from the weights, and the page."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.data.text import TextFacts
from coterie.inspect.composition import inspect_composition, summary, write_page
from coterie.tasks._language_models import build_language_model

FACTS = TextFacts("bytes", 257, 256, 16, False, False)
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}


def model(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_language_model("dcformer", {**SMALL, **options}, FACTS).eval()


def test_maps_of_zero_have_no_strength_and_gates_have_theirs() -> None:
    network = model()
    for layer in network.model.layers:
        layer.self_attn.maps.set_identity()
    for layer in inspect_composition(network, list(range(10))):
        assert set(layer.strength.values()) == {0.0}
        assert layer.by_token.tolist() == [0.0] * 10
    maps = network.model.layers[1].self_attn.maps
    maps.hidden.weight.data.zero_()
    maps.gate.register_forward_hook(lambda *_: torch.full((1, 10, 16), 9.0))  # tanh of it is 1: maps are identities
    first, second = inspect_composition(network, list(range(10)))
    assert set(first.strength.values()) == {0.0}
    assert second.strength["pre", "query"] == pytest.approx(1.0, abs=1e-6)
    assert second.strength["post", "together"] == pytest.approx(2.0, abs=1e-6)
    np.testing.assert_allclose(second.maps["pre"], 2 * np.eye(4), atol=1e-6)


def test_only_what_there_is_is_reported() -> None:
    (layer, _) = inspect_composition(model(composition_uses=["post"], composition_sides=["key"]), [1, 2, 3])
    assert set(layer.strength) == {("post", "key"), ("post", "together")}
    assert layer.strength["post", "together"] > 0
    static = model(static_composition=True, composition_sides=[])
    (layer, _) = inspect_composition(static, [1, 2, 3])
    norm = static.model.layers[0].self_attn.maps.static_pre.norm().item() / 2
    assert layer.strength["pre", "together"] == layer.strength["pre", "static"] == pytest.approx(norm)
    with pytest.raises(ValueError, match="has no layers whose heads compose"):
        inspect_composition(model(composition_uses=[]), [1])
    with pytest.raises(ValueError, match="there are no tokens"):
        inspect_composition(model(), [])


def test_the_page_stands_alone(tmp_path: Path) -> None:
    layers = inspect_composition(model(), [104, 105, 60, 62])
    assert [line.split(":")[0] for line in summary(layers)] == ["layer 1", "layer 2"]
    written = write_page(layers, ["h", "i", "<", ">"], tmp_path, title="run & co", parameters=12)
    content = written.read_text()
    assert "run &amp; co" in content
    assert "&lt;</span>" in content
    assert "http" not in content.replace("http://www.w3.org/2000/svg", "")
    assert (tmp_path / "composition.png").read_bytes().startswith(b"\x89PNG")
