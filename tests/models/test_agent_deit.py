"""Agent-DeiT against figures that the authors' code gave (tests/golden/make_agent.py), and what theirs cannot do."""

import pytest
import torch
from agent_cases import check_figures, figures_of, make_agent, model_of


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [
        ("deit_tiny_224", torch.float64, 1e-12),
        ("deit_tiny_144", torch.float64, 1e-12),
        ("deit_tiny_144", torch.float32, 2e-5),
    ],
)
def test_ours_equals_the_authors(case, dtype, tolerance):
    figures = figures_of(case)
    model = model_of(figures, dtype)
    image = make_agent.image_of(figures["size"], dtype)
    with torch.no_grad():
        _, layers = model.forward_intermediates(image, indices=[2, 5, 8, 11], return_prefix_tokens=True)
        logits = model(image)
    tokens = [torch.cat([prefix[0], maps[0].flatten(1).T]) for maps, prefix in layers]
    check_figures(figures, logits, tokens, tolerance)
