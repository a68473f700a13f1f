"""Agent-CSWin against figures that the authors' code gave (tests/golden/make_agent.py)."""

import pytest
import torch
from agent_cases import check_figures, figures_of, make_agent, model_of


@pytest.mark.parametrize("case", ["cswin_tiny_224"])
def test_ours_equals_the_authors(case):
    figures = figures_of(case)
    model = model_of(figures)
    with torch.no_grad():
        last, maps = model.forward_intermediates(make_agent.image_of(figures["size"]))
        logits = model.forward_head(last)
    check_figures(figures, logits, [m[0].flatten(1).T for m in maps], 1e-12)
