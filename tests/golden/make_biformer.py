"""Makes the figures in tests/golden/biformer by running the authors' own code, in float64.

    python tests/golden/make_biformer.py CHECKOUT

with a checkout of rayleizhu/BiFormer (commit 1697bbb). Nothing of theirs is kept but figures: a file holds the options,
names and shapes of their parameters, the seed of `coterie.testing.weights`, which regions each region chose, some
values of each stage's map, and logits. Their library for checkpointing activations is not needed, and replaced.

Weights are generated from names and shapes; `running_var` is one more than generated, so that it is positive.
"""

import json
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from coterie.testing import generated_tensor, generated_weights

OUT = Path(__file__).parent / "biformer"
SEED = 20230315
SHALLOW = {"depth": [1, 1, 2, 1]}
NCHW = {"global_lepe_of": "value"}
# case: (authors' variant, their options, height, width, our name, our options)
CASES: dict[str, tuple[str, dict, int, int, str, dict]] = {
    "tiny": ("tiny", {}, 224, 224, "biformer_tiny", {}),
    "small": ("small", {}, 224, 224, "biformer_small", {}),
    "base": ("base", {}, 224, 224, "biformer_base", {}),
    "stl": ("stl", {}, 224, 224, "biformer_stl", {}),
    "stl_nchw": ("stl_nchw", {}, 224, 224, "biformer_stl", NCHW),
    "tiny_oblong": ("tiny", {}, 112, 336, "biformer_tiny", {}),
    "tiny_auto_pad": ("tiny", {"auto_pad": True}, 195, 101, "biformer_tiny", {"uneven": "padded_input"}),
    "stl_oblong": ("stl", SHALLOW, 224, 448, "biformer_stl", {"depths": (1, 1, 2, 1)}),
    "stl_nchw_uneven": ("stl_nchw", SHALLOW, 256, 320, "biformer_stl",
                        {**NCHW, "depths": (1, 1, 2, 1), "uneven": "padded_projection"}),
}  # fmt: skip
_CONV = {"mlp_ratios": [3, 3, 3, 3], "n_win": 7, "kv_downsample_mode": "identity", "kv_per_wins": [-1, -1, -1, -1],
         "topks": [1, 4, 16, -2], "side_dwconv": 5, "before_attn_dwconv": 3, "head_dim": 32}  # fmt: skip
_NARROW, _WIDE = [64, 128, 256, 512], [96, 192, 384, 768]
_STL = {"depth": [2, 2, 6, 2], "embed_dim": _WIDE, "norm_layer": nn.BatchNorm2d}
SETTINGS: dict[str, tuple[str, str, dict]] = {
    "tiny": ("biformer", "BiFormer", {**_CONV, "depth": [2, 2, 8, 2], "embed_dim": _NARROW, "qk_dims": _NARROW}),
    "small": ("biformer", "BiFormer", {**_CONV, "depth": [4, 4, 18, 4], "embed_dim": _NARROW, "qk_dims": _NARROW}),
    "base": ("biformer", "BiFormer", {**_CONV, "depth": [4, 4, 18, 4], "embed_dim": _WIDE, "qk_dims": _WIDE}),
    "stl": ("biformer_stl", "BiFormerSTL", {**_STL, "topks": (1, 4, 16, -2)}),
    "stl_nchw": ("biformer_stl_nchw", "nchwBiFormerSTL", {**_STL, "topks": (1, 4, 16, -1)}),
}


def authors_model(checkout: Path, variant: str, **options) -> nn.Module:
    """Their network of a published variant ("tiny", "small", "base", "stl", "stl_nchw"), by their class's options.

    Their packages are called `models` and `ops`, and register names with timm; neither is left behind.
    """
    import timm.models

    module, kind, settings = SETTINGS[variant]
    fairscale = types.ModuleType("fairscale.nn.checkpoint")
    fairscale.checkpoint_wrapper = lambda layer: layer
    stubs = {"fairscale": types.ModuleType("fairscale"), "fairscale.nn": types.ModuleType("fairscale.nn")}
    known = {name: part for name, part in sys.modules.items() if not _theirs(name)}
    with (
        mock.patch.dict(sys.modules, {**known, **stubs, "fairscale.nn.checkpoint": fairscale}, clear=True),
        mock.patch.object(sys, "path", [str(checkout), *sys.path]),
        mock.patch.object(timm.models, "register_model", lambda entrypoint: entrypoint),
    ):
        package = types.ModuleType("models")  # its own __init__ would import all of their architectures
        package.__path__ = [str(Path(checkout) / "models")]
        sys.modules["models"] = package
        network = __import__(f"models.{module}", fromlist=[kind])
        return getattr(network, kind)(**{**settings, **options})


def _theirs(name: str) -> bool:
    return name.split(".")[0] in ("models", "ops")


def weights(shapes: Iterable[tuple[str, Iterable[int]]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The state of a network: generated, with variances that are positive; counters of batches stay 0."""
    state = generated_weights(shapes, SEED, dtype=dtype)
    for name, value in state.items():
        if name.endswith("running_var"):
            value += 1
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
    return state


def image(height: int, width: int) -> Tensor:
    """One image of mean 0 and variance 1, float64."""
    return generated_tensor("image", (1, 3, height, width), SEED) * (3 * height * width) ** 0.25


def some(values: Tensor, count: int) -> list[float]:
    """Evenly spread values of a tensor, in its order in memory as (channels, rows, columns)."""
    flat = values.flatten()
    picked = flat[torch.linspace(0, flat.numel() - 1, count).round().long()]
    return [float(f"{x:.15g}") for x in picked.tolist()]


def stage_figures(stage: Tensor) -> dict:
    """Shape, mean, standard deviation and some values of a map (1, channels, rows, columns)."""
    return {"shape": list(stage.shape), "mean": float(stage.mean()), "std": float(stage.std()), "some": some(stage, 24)}


def choice(chosen: Tensor) -> str:
    """Which of `regions` regions each region chose, (regions, top_k) indices, as a matrix of bits in hexadecimal."""
    regions = chosen.shape[0]
    bits = torch.zeros(regions, regions, dtype=torch.int).scatter_(1, chosen.cpu(), 1)
    return f"{regions}:{int(''.join(map(str, bits.flatten().tolist())), 2):x}"


def figures(model: nn.Module, x: Tensor) -> dict:
    """What their network gives: the choices of each block, maps of the stages, logits."""
    choices: list[str] = []
    maps: list[Tensor] = []
    margins: list[float] = []

    def router(module, inputs, output):
        query, key = inputs
        affinity = (query @ key.transpose(-1, -2))[0].sort(-1, descending=True).values
        margins.append(float((affinity[:, module.topk - 1] - affinity[:, module.topk]).min() / affinity.std()))
        choices.append(choice(output[1][0]))

    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, output: maps.append(output))
    for module in model.modules():
        if type(module).__name__ == "TopkRouting":
            module.register_forward_hook(router)
        if type(module).__name__ == "nchwBRA":
            inner = module.attn_fn

            def attend(*, region_graph, inner=inner, **rest):
                choices.append(choice(region_graph[0, 0]))
                return inner(region_graph=region_graph, **rest)

            module.attn_fn = attend
    with torch.no_grad():
        logits = model(x)[0]
    assert logits.dtype == torch.float64
    if margins:
        print(f"  closest call between the last region chosen and the next: {min(margins):.1e} standard deviations")
    return {
        "choices": choices,
        "stages": [stage_figures(stage) for stage in maps],
        "logits": {"mean": float(logits.mean()), "std": float(logits.std()), "some": some(logits, 100)},
    }


def main() -> None:
    checkout = Path(sys.argv[1])
    OUT.mkdir(exist_ok=True)
    for case, (variant, options, height, width, name, ours) in CASES.items():
        model = authors_model(checkout, variant, **options).double().eval()
        shapes = {n: list(p.shape) for n, p in model.state_dict().items()}
        model.load_state_dict(weights(shapes.items()))
        found = figures(model, image(height, width))
        kept = {
            "authors_code": "rayleizhu/BiFormer 1697bbb",
            "authors": {"variant": variant, "options": options},
            "ours": {"name": name, "options": ours},
            "size": [height, width],
            "seed": SEED,
            "shapes": shapes,
            **found,
        }
        (OUT / f"{case}.json").write_text(json.dumps(kept) + "\n")
        print(f"{case}: logits of mean {found['logits']['mean']:.3f}, deviation {found['logits']['std']:.3f}")


if __name__ == "__main__":
    main()
