"""Makes the figures in tests/golden/crossformer by running the authors' own code, in float64.

    python tests/golden/make_crossformer.py NEWER OLDER

with two checkouts of cheerss/CrossFormer: the head of the branch main (7952010), and that of the branch crossformer,
the code of 2021. Nothing of theirs is kept but figures: a file holds what the model was built with, the seed of
`coterie.testing.weights`, the logits, and of the map of every stage its mean, standard deviation and a few values.
`keys_newer.json` and `keys_older.json` hold the names and shapes of every variant's checkpoint.

Their classification code takes square images only, because the embedding computes both sides of the grid from the
image's height; here both sides are given to it. The rest of it knows what to do with them.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import re
import sys
import types
from pathlib import Path
from unittest import mock

import timm.layers
import torch
from torch import nn

from coterie.testing import generated_tensor, generated_weights

OUT = Path(__file__).parent / "crossformer"
SEED = 20210802
SIZES = {"tiny": (64, [1, 1, 8, 6]), "small": (96, [2, 2, 6, 2]), "base": (96, [2, 2, 18, 2]),
         "large": (128, [2, 2, 18, 2]), "pp_small": (64, [2, 2, 18, 2]), "pp_base": (96, [2, 2, 18, 2]),
         "pp_large": (128, [2, 2, 18, 2]), "pp_huge": (128, [6, 6, 18, 2])}  # fmt: skip
# file: which checkout (0 newer, 1 older), variant, height, width, depths if not the variant's
CASES = {
    "tiny_224": (0, "tiny", 224, 224, None),
    "small_224": (0, "small", 224, 224, None),
    "pp_small_224": (0, "pp_small", 224, 224, None),
    "uneven": (0, "tiny", 256, 320, [2, 2, 2, 2]),
    "pp_uneven": (0, "pp_small", 256, 320, [2, 2, 4, 2]),
    "small_grid": (0, "tiny", 160, 288, [1, 2, 2, 2]),
    "older_growing": (1, "tiny", 448, 224, [1, 2, 2, 2]),
}


def authors_model(checkout: Path, variant: str, *, image_size: tuple[int, int] = (224, 224), **options) -> nn.Module:
    """A model of their code: `variant` is "tiny", ..., "pp_huge"; `options` go over its configuration's."""
    spec = importlib.util.spec_from_file_location("authors_crossformer", Path(checkout) / "models" / "crossformer.py")
    module = importlib.util.module_from_spec(spec)
    moved = types.ModuleType("timm.models.layers")  # where timm kept them in 2021
    for name in ("DropPath", "to_2tuple", "trunc_normal_"):
        setattr(moved, name, getattr(timm.layers, name))
    with mock.patch.dict(sys.modules, {"timm.models.layers": moved}):
        spec.loader.exec_module(module)

    class PatchEmbed(module.PatchEmbed):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.img_size = image_size
            self.patches_resolution = [side // self.patch_size[0] for side in image_size]

    module.PatchEmbed = PatchEmbed
    newer = "crs_interval" in module.CrossFormer.__init__.__code__.co_varnames
    width, depths = SIZES[variant]
    settings = {"embed_dim": width, "depths": depths, "num_heads": [width // 32 << stage for stage in range(4)],
                "patch_size": [4, 8, 16, 32], "merge_size": [[2, 4]] * 3, "group_size": [7] * 4,
                "mlp_ratio": [4.0] * 4 if newer else 4.0}  # fmt: skip
    if variant.startswith("pp_"):
        settings |= {"group_size": [4, 4, 14, 7], "crs_interval": [4, 2, 1, 1], "use_acl": True}
    with contextlib.redirect_stdout(io.StringIO()):
        return module.CrossFormer(img_size=max(image_size), **{**settings, **options})


def fold(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Blocks of a stage written as one: "layers.2.blocks.0-17.norm1.weight"."""
    found: dict[tuple, list[int]] = {}
    for name, shape in shapes.items():
        before, block, after = re.fullmatch(r"(layers\.\d\.blocks\.|)(\d*)(.*)", name).groups()
        found.setdefault((before, after, tuple(shape)), []).append(int(block or -1))
    folded = {}
    for (before, after, shape), blocks in found.items():
        for _, run in itertools.groupby(enumerate(sorted(blocks)), lambda pair: pair[1] - pair[0]):
            run = [block for _, block in run]
            numbers = "" if run[0] < 0 else f"{run[0]}-{run[-1]}"
            folded[before + numbers + after] = list(shape)
    return folded


def figures_of(model: nn.Module, image: torch.Tensor) -> dict:
    """Logits, and of the last block of every stage the map, (tokens, channels)."""
    maps = []
    hooks = [layer.blocks[-1].register_forward_hook(lambda *args: maps.append(args[2][0])) for layer in model.layers]
    with torch.no_grad():
        logits = model(image)[0]
    for hook in hooks:
        hook.remove()
    assert logits.dtype == torch.float64
    return {
        "logits": [float(f"{x:.12g}") for x in logits[::20].tolist()],
        "logits_mean": logits.mean().item(),
        "logits_std": logits.std().item(),
        "maps": [
            {
                "mean": x.mean().item(),
                "std": x.std().item(),
                "values": [float(f"{v:.12g}") for v in x.flatten()[:: x.numel() // 25].tolist()],
            }
            for x in maps
        ],
    }


def main() -> None:
    checkouts = [Path(path) for path in sys.argv[1:]]
    for age, checkout in zip(("newer", "older"), checkouts, strict=True):
        variants = [v for v in SIZES if age == "newer" or not v.startswith("pp_")]
        states = {v: authors_model(checkout, v).state_dict() for v in variants}
        keys = {v: fold({n: list(t.shape) for n, t in state.items()}) for v, state in states.items()}
        (OUT / f"keys_{age}.json").write_text(json.dumps(keys) + "\n")
    for case, (age, variant, height, width, depths) in CASES.items():
        changed = {} if depths is None else {"depths": depths}
        model = authors_model(checkouts[age], variant, image_size=(height, width), **changed).double().eval()
        shapes = {n: list(p.shape) for n, p in model.named_parameters()}
        missing, unexpected = model.load_state_dict(generated_weights(shapes.items(), SEED), strict=False)
        assert not unexpected, unexpected
        assert all(n.endswith(("biases", "relative_position_index")) for n in missing), missing
        figures = {
            "authors_code": f"cheerss/CrossFormer, branch {('main', 'crossformer')[age]}",
            "variant": variant,
            "image_size": [height, width],
            "depths": depths or SIZES[variant][1],
            "seed": SEED,
            "shapes": fold(shapes),
            **figures_of(model, generated_tensor("image", (1, 3, height, width), SEED) * (3 * height * width) ** 0.25),
        }
        (OUT / f"{case}.json").write_text(json.dumps(figures) + "\n")
        print(f"{case}: logits of mean {figures['logits_mean']:.3f}, standard deviation {figures['logits_std']:.3f}")


if __name__ == "__main__":
    main()
