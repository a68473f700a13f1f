"""Makes tests/golden/efficientvit/*.json by running the authors' own window attention, in float64.

    python tests/golden/make_efficientvit.py CHECKOUT

with a checkout of microsoft/Cream, commit 4a13c40. Nothing of theirs is kept but figures: names and shapes of their
parameters, the seed of `coterie.testing.weights`, the shape of the input, and the output. Running variances are those
weights' absolute values plus 0.5.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

from coterie.testing import generated_tensor, generated_weights

OUT = Path(__file__).parent / "efficientvit"
SEED = 20230511
# heads, channels, resolution that the module is made for: their code takes maps of that size only
CASES = {"windows": (3, 48, 9), "small": (2, 32, 4)}
KERNELS = [7, 5, 3, 3]


def authors_code(checkout: Path) -> types.ModuleType:
    """Their model's file."""
    path = checkout / "EfficientViT" / "classification" / "model" / "efficientvit.py"
    spec = importlib.util.spec_from_file_location("authors_efficientvit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    code = authors_code(Path(sys.argv[1]))
    OUT.mkdir(exist_ok=True)
    for name, (heads, dim, side) in CASES.items():
        m = code.LocalWindowAttention(
            dim, 16, heads, attn_ratio=dim / heads / 16, resolution=side, window_resolution=7, kernels=KERNELS
        ).double()
        state = m.attn.state_dict()
        shapes = {n: tuple(t.shape) for n, t in state.items() if t.is_floating_point()}
        weights = generated_weights(shapes.items(), SEED)
        weights = {n: t.abs() + 0.5 if n.endswith("running_var") else t for n, t in weights.items()}
        m.attn.load_state_dict({**state, **weights})
        m.eval()  # after loading: their table of biases is spread out here
        x = generated_tensor("x", (1, dim, side, side), SEED)
        with torch.no_grad():
            y = m(x)[0].flatten(1)
        figures = {
            "authors_code": "microsoft/Cream 4a13c40",
            "seed": SEED,
            "heads": heads,
            "side": side,
            "shapes": shapes,
            "output": [[float(f"{v:.12g}") for v in row] for row in y[:, :: max(1, side // 3)].tolist()],
            "every": max(1, side // 3),
        }
        (OUT / f"{name}.json").write_text(json.dumps(figures) + "\n")
        print(f"{name}: mean {y.mean():.4f}, standard deviation {y.std():.4f}")


if __name__ == "__main__":
    main()
