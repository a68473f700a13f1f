"""Makes tests/golden/davit/*.json by running the authors' own attention modules, in float64.

    python tests/golden/make_davit.py CHECKOUT

with a checkout of dingmyu/davit, commit fc79470. Nothing of theirs is kept but figures: names and shapes of their
parameters, the seed of `coterie.testing.weights`, the shape of the input, and the output.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch
from torch import nn

from coterie.testing import generated_tensor, generated_weights

OUT = Path(__file__).parent / "davit"
SEED = 20220407
# mechanism: heads, grid, channels
CASES = {"channel": (3, (5, 7), 12), "window": (2, (9, 12), 8)}


def authors_code(checkout: Path) -> types.ModuleType:
    """Their backbone of the segmentation code, with stand-ins for what it imports of mmcv and mmseg."""
    registry = types.SimpleNamespace(register_module=lambda *_, **__: lambda cls: cls)
    stand_ins = {
        "mmcv_custom": types.SimpleNamespace(load_checkpoint=None),
        "mmseg": types.ModuleType("mmseg"),
        "mmseg.utils": types.SimpleNamespace(get_root_logger=None),
        "authors": types.ModuleType("authors"),
        "authors.builder": types.SimpleNamespace(BACKBONES=registry),
        "authors.backbones": types.ModuleType("authors.backbones"),
    }
    stand_ins["authors"].__path__ = stand_ins["authors.backbones"].__path__ = []
    path = checkout / "mmseg" / "mmseg" / "models" / "backbones" / "davit.py"
    spec = importlib.util.spec_from_file_location("authors.backbones.davit", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stand_ins):
        spec.loader.exec_module(module)
    return module


class Same(nn.Module):
    """In the place of position encodings, norms and feed-forward: what is left of a block is x + attention(x)."""

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        return x


def main() -> None:
    code = authors_code(Path(sys.argv[1]))
    OUT.mkdir(exist_ok=True)
    for name, (heads, grid, dim) in CASES.items():
        x = generated_tensor("x", (1, grid[0] * grid[1], dim), SEED)
        if name == "channel":
            attn = run = code.ChannelAttention(dim, heads, qkv_bias=True).double()
        else:
            block = code.SpatialBlock(dim, heads, window_size=7, ffn=False).double()
            block.cpe = nn.ModuleList([Same(), Same()])
            block.norm1, attn = Same(), block.attn

            def run(x: torch.Tensor, block: nn.Module = block, grid: tuple[int, int] = grid) -> torch.Tensor:
                return block(x, grid)[0] - x

        shapes = {n: tuple(t.shape) for n, t in attn.state_dict().items()}
        attn.load_state_dict(generated_weights(shapes.items(), SEED))
        with torch.no_grad():
            y = run(x)[0]
        figures = {
            "authors_code": "dingmyu/davit fc79470",
            "seed": SEED,
            "heads": heads,
            "grid": grid,
            "shapes": shapes,
            "output": [[float(f"{v:.12g}") for v in row] for row in y.tolist()],
        }
        (OUT / f"{name}.json").write_text(json.dumps(figures) + "\n")
        print(f"{name}: mean {y.mean():.4f}, standard deviation {y.std():.4f}")


if __name__ == "__main__":
    main()
