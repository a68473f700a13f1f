"""The rule that makes weights: fixed for good, since figures in tests/golden rest on it."""

import pytest
import torch

from coterie.testing import generated_tensor, generated_weights


def test_the_rule_does_not_change():
    expected = [-0.3240917497397107, 0.6938818373618997, 0.28153516180852195, -0.24063299441652095]
    assert generated_tensor("layer.weight", (2, 2), seed=7).flatten().tolist() == pytest.approx(expected, rel=1e-15)


def test_a_tensor_depends_on_its_name_shape_and_seed_only():
    shapes = {"a.weight": (3, 4), "b.weight": (3, 4), "b.bias": (3,)}
    weights = generated_weights(shapes.items())
    again = generated_weights(reversed(shapes.items()), dtype=torch.float32)
    assert list(weights) == list(shapes)
    for name, tensor in weights.items():
        assert tensor.shape == shapes[name]
        assert torch.equal(tensor.float(), again[name])
    assert not torch.equal(weights["a.weight"], weights["b.weight"])
    assert not torch.equal(generated_tensor("a.weight", (3, 4), seed=1), weights["a.weight"])


@pytest.mark.parametrize(
    ("name", "shape", "mean", "std"),
    [
        ("linear.weight", (100, 100), 0, 0.1),
        ("conv.weight", (16, 16, 5, 5), 0, (16 * 16 * 25) ** -0.25),
        ("norm.weight", (4000,), 1, 0.1),
        ("q_norm.scale", (4000,), 1, 0.1),
        ("linear.bias", (4000,), 0, 0.1),
    ],
)
def test_sizes_are_those_of_a_network(name, shape, mean, std):
    values = generated_tensor(name, shape)
    assert float(values.mean()) == pytest.approx(mean, abs=4 * std / values.numel() ** 0.5)
    assert float(values.std()) == pytest.approx(std, rel=0.05)
    assert float((values - mean).abs().max()) <= 3**0.5 * std * 1.0001


def test_a_scalar_has_one_value():
    assert generated_tensor("logit_scale", ()).shape == ()
