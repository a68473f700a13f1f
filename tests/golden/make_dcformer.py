"""Makes the figures in tests/golden/dcformer by running the authors' own code, in float64.

    python tests/golden/make_dcformer.py CHECKOUT_4375C18 CHECKOUT_HEAD

with two checkouts of Caiyun-AI/DCFormer: commit 4375c18 (29 May 2024), whose inference is the reference, and the head
of the main branch, from which only the gated feed-forward of the 8B model is taken. Nothing of theirs is kept but
figures: a file holds the configuration, names and shapes of their parameters, the seed of `coterie.testing.weights`,
token ids, and the logits. Their half-precision casts are undone while the script runs, so that the figures are exact.

Their prefill lets a local layer see window + 1 keys, their step-by-step decoding sees window. So "prefill" cases go
through all tokens at once, and "decode" cases prefill no more than the window and go on token by token.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from coterie.testing import generated_weights

OUT = Path(__file__).parent / "dcformer"
SEED = 20240529
PLUS = {"block_size": 32, "vocab_size": 11, "n_layer": 4, "n_head": 4, "dim": 32, "intermediate_size": 40,
        "use_qk_norm": True, "window_size": 6, "norm_eps": 1e-6}  # fmt: skip
PYTHIA = {**PLUS, "dim": 64, "n_layer": 3, "rotary_pct": 0.25, "norm_eps": 1e-5, "intermediate_size": 48}
LGLL = {**PLUS, "n_layer": 4, "window_type": "LGLL", "rope_base": 500000.0, "mgate": True, "mgate_dim": 5}
LONG = {**PLUS, "block_size": 272, "n_layer": 3, "window_size": 256}
# name: module, configuration, tokens, tokens of the first call, positions whose logits are kept
CASES = {
    "plus_prefill": ("dcformer", PLUS, 16, 16, None),
    "plus_decode": ("dcformer", PLUS, 18, 6, None),
    "plus_long_decode": ("dcformer", LONG, 264, 256, [0, 3, 100, 254, 255, 256, 257, 258, 263]),
    "plus_query_wise_decode": ("dcformer", {**PLUS, "query_wise": True}, 14, 1, None),
    "lgll_mgate_prefill": ("dcformer", LGLL, 16, 16, None),
    "lgll_mgate_decode": ("dcformer", LGLL, 18, 6, None),
    "pythia_prefill": ("dcpythia", PYTHIA, 16, 16, None),
    "pythia_decode": ("dcpythia", PYTHIA, 18, 6, None),
}


def authors_module(checkout: Path, name: str) -> types.ModuleType:
    """`modeling_{name}`, from its file."""
    folder = checkout / "pytorch" / name
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        for part in ("configuration", "modeling"):
            spec = importlib.util.spec_from_file_location(f"{part}_{name}", folder / f"{part}_{name}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
    return module


class ExactTorch(types.ModuleType):
    """torch, whose half precision is double."""

    def __init__(self):
        super().__init__("torch")

    def __getattr__(self, name):
        return torch.float64 if name in ("float16", "float32") else getattr(torch, name)


def authors_logits(module, head, name, settings, ids, first):
    """Their logits for `ids` (1, tokens): `first` of them at once, the others one by one."""
    config = getattr(module, {"dcformer": "DCFormerConfig", "dcpythia": "DCPythiaConfig"}[name])(**settings)
    model = getattr(module, {"dcformer": "DCFormer", "dcpythia": "DCPythia"}[name])(config)
    if settings.get("mgate"):
        for layer in model.layers:
            layer.feed_forward = head.FeedForward(config)
    for layer in model.layers:
        if layer.attention.window_size is not None:  # window types have a window of 256 written into the code
            layer.attention.window_size = settings["window_size"]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.endswith(("dw_m", "qkw_m"))}
    missing, unexpected = model.double().load_state_dict(generated_weights(shapes.items(), SEED), strict=False)
    made = ("dw_m", "qkw_m", "pre_proj.w", "post_proj.w")  # merged copies and identities, which they make themselves
    assert not unexpected, unexpected
    assert all(n.endswith(made) for n in missing), missing
    model.setup_caches(1, settings["block_size"])
    model.double()
    with torch.no_grad():
        logits = [model(ids[:, :first], input_pos=torch.arange(first)).logits]
        logits += [model(ids[:, t : t + 1], input_pos=torch.tensor([t])).logits for t in range(first, ids.shape[1])]
    return shapes, torch.cat(logits, dim=1)[0]


def main() -> None:
    reference, newest = (Path(path) for path in sys.argv[1:])
    head = authors_module(newest, "dcformer")
    modules = {name: authors_module(reference, name) for name in ("dcformer", "dcpythia")}
    OUT.mkdir(exist_ok=True)
    for case, (name, settings, tokens, first, kept) in CASES.items():
        module = modules[name]
        module.torch = head.torch = ExactTorch()
        ids = torch.from_numpy(np.random.PCG64(SEED).random_raw(tokens) % settings["vocab_size"]).long()[None]
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            shapes, logits = authors_logits(module, head, name, settings, ids, first)
        kept = list(range(tokens)) if kept is None else kept
        figures = {
            "authors_code": "Caiyun-AI/DCFormer 4375c18",
            "config": {"model_type": name, **settings},
            "seed": SEED,
            "shapes": {n: list(s) for n, s in shapes.items()},
            "first_call": first,
            "input_ids": ids[0].tolist(),
            "positions": kept,
            "logits": [[float(f"{x:.15g}") for x in row] for row in logits[kept].tolist()],
        }
        assert logits.dtype == torch.float64
        (OUT / f"{case}.json").write_text(json.dumps(figures) + "\n")
        print(f"{case}: logits of mean {logits.mean():.3f} and standard deviation {logits.std():.3f}")


if __name__ == "__main__":
    main()
