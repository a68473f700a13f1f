"""DCFormer against figures that the authors' code gave (tests/golden/make_dcformer.py says how they were made).

Their prefill lets a local layer see window + 1 keys (itself and `window` before it); their step-by-step decoding and
their training code see `window`. Ours always sees `window`; for prefill beyond the window, `authors_prefill_window`
sets ours one wider.
"""

import json
from pathlib import Path

import pytest
import torch

from coterie.models.dcformer import DCFormerForCausalLM, config_from_authors
from coterie.models.dcformer.checkpoints import convert_authors_state
from coterie.testing import generated_weights

FOLDER = Path(__file__).parents[1] / "golden" / "dcformer"
PREFILL = ["plus_prefill", "lgll_mgate_prefill", "pythia_prefill"]
DECODE = ["plus_decode", "plus_long_decode", "plus_query_wise_decode", "lgll_mgate_decode", "pythia_decode"]


def model_of(figures, dtype, *, authors_prefill_window=False):
    config = config_from_authors(figures["config"])
    config.sliding_window = figures["config"]["window_size"] + authors_prefill_window
    model = DCFormerForCausalLM(config).to(dtype).eval()
    theirs = generated_weights(figures["shapes"].items(), figures["seed"], dtype=dtype)
    model.load_state_dict(convert_authors_state(theirs, config), strict=True)
    return model


def figures_of(case):
    return json.loads((FOLDER / f"{case}.json").read_text())


@pytest.mark.parametrize("case", PREFILL + DECODE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_ours_equals_the_authors(case, dtype, tolerance):
    figures = figures_of(case)
    expected = torch.tensor(figures["logits"], dtype=torch.float64)
    model = model_of(figures, dtype, authors_prefill_window=case in PREFILL)
    with torch.no_grad():
        logits = model(torch.tensor([figures["input_ids"]])).logits[0, figures["positions"]]
    assert float((logits.double() - expected).abs().max() / expected.abs().max()) <= tolerance


@pytest.mark.parametrize("case", DECODE)
def test_our_step_by_step_decoding_equals_theirs(case):
    figures = figures_of(case)
    model = model_of(figures, torch.float64)
    ids = torch.tensor([figures["input_ids"]])
    expected = torch.tensor(figures["logits"], dtype=torch.float64)
    first = figures["first_call"]
    with torch.no_grad():
        out = model(ids[:, :first], use_cache=True)
        logits = [out.logits]
        for t in range(first, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            logits.append(out.logits)
    ours = torch.cat(logits, dim=1)[0, figures["positions"]]
    assert float((ours - expected).abs().max() / expected.abs().max()) <= 1e-12


@pytest.mark.parametrize("case", PREFILL)
def test_the_windows_differ_by_one_key(case):
    figures = figures_of(case)
    expected = torch.tensor(figures["logits"], dtype=torch.float64)
    with torch.no_grad():
        logits = model_of(figures, torch.float64)(torch.tensor([figures["input_ids"]])).logits[0]
    window = figures["config"]["window_size"]
    differs = (logits - expected).abs().amax(-1) > 1e-9
    assert differs.tolist() == [t >= window for t in range(len(differs))]
