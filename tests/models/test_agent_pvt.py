"""Agent-PVT against figures that the authors' code gave (tests/golden/make_agent.py), and what theirs cannot do."""

import pytest
import torch
from agent_cases import check_figures, figures_of, make_agent, model_of


@pytest.mark.parametrize(
    ("case", "dtype", "tolerance"),
    [
        ("pvt_tiny_224", torch.float64, 1e-12),
        ("pvt_tiny_160", torch.float64, 1e-12),
        ("pvt_tiny_160", torch.float32, 2e-5),
    ],
)
def test_ours_equals_the_authors(case, dtype, tolerance):
    figures = figures_of(case)
    model = model_of(figures, dtype)
    with torch.no_grad():
        last, maps = model.forward_intermediates(make_agent.image_of(figures["size"], dtype))
        logits = model.forward_head(last)
    check_figures(figures, logits, [m[0].flatten(1).T for m in maps], tolerance)
