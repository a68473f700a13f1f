"""Makes the figures in tests/golden/litv2 by running the authors' own code, in float64.

    python tests/golden/make_litv2.py CHECKOUT

with a checkout of ziplab/LITv2 (commit 7501c86). Nothing of theirs is kept but figures: a file holds names and shapes
of their parameters and buffers, the seed of `coterie.testing.weights` (which makes the weights, and the images under
the name "images"), and what the model gave. Their deformable convolution is a CUDA extension; torchvision's, which has
the same parameters and the same order of offsets, takes its place. Running variances are the absolute of the generated.

    small, medium, base      classifiers at their published size: logits, and each stage's map
    small_dense_75x107       the backbone of their segmentation code at an odd size, where nothing divides
    hilo_6x10                their stand-alone HiLo, which takes any grid that the windows divide
    hilo_dense_7x9           HiLo of their segmentation code, which fills up windows with zeros
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import timm.layers
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from coterie.testing import generated_tensor, generated_weights

OUT = Path(__file__).parent / "litv2"
SEED = 20220526
SIZES = {
    "small": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "medium": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
}
HILO = {"dim": 40, "num_heads": 5, "qkv_bias": True, "alpha": 0.7}


class DeformConv2dPack(nn.Module):
    """What their extension provides, on torchvision's operator."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.conv_offset = nn.Conv2d(in_channels, 2 * kernel_size**2, kernel_size, stride, padding)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x):
        return deform_conv2d(x, self.conv_offset(x), self.weight, self.bias, self.stride, self.padding)


def _stubs():
    """Modules that their code imports and that are not at hand: extension, registries, an old place in timm."""
    found = {"timm.models.layers": timm.layers}
    for name in ("mm_modules", "mm_modules.DCN", "mm_modules.DCN.modules", "mm_modules.DCN.modules.deform_conv2d",
                 "mmcv_custom", "mmseg", "mmseg.utils", "their_dense", "their_dense.builder"):  # fmt: skip
        found[name] = types.ModuleType(name)
        found[name].__path__ = []
    found["mm_modules.DCN.modules.deform_conv2d"].DeformConv2dPack = DeformConv2dPack
    found["mmcv_custom"].load_checkpoint = found["mmseg.utils"].get_root_logger = None
    found["their_dense.builder"].BACKBONES = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    return found


def _module(file: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {**_stubs(), name: module}):
        spec.loader.exec_module(module)
    return module


def authors_model(checkout: Path, variant: str, **options) -> nn.Module:
    """Their classifier "small", "medium" or "base", for `img_size` (224), without stochastic depth."""
    ours = [name for name in sys.modules if name == "models" or name.startswith("models.")]
    assert not ours, "another package named models is loaded: theirs has that name too"
    try:
        with (
            mock.patch.dict(sys.modules, _stubs()),
            mock.patch.object(sys, "path", [str(checkout / "classification"), *sys.path]),
        ):
            module = importlib.import_module("models.litv2")
    finally:
        for name in [name for name in sys.modules if name == "models" or name.startswith("models.")]:
            del sys.modules[name]
    settings = {"alpha": 0.9, "local_ws": [0, 0, 2, 1], "drop_path_rate": 0.0}
    return module.LITv2(**{**SIZES[variant], **settings, **options})


def authors_dense(checkout: Path) -> types.ModuleType:
    """Their segmentation backbone's module."""
    return _module(
        checkout / "segmentation" / "mmseg" / "models" / "backbones" / "litv2.py", "their_dense.backbones.litv2"
    )


def filled(model: nn.Module) -> tuple[nn.Module, dict[str, list[int]]]:
    """The model in float64 evaluation with generated weights, and its names and shapes."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    floats = {name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")}
    weights = generated_weights(floats.items(), SEED)
    for name in weights:
        if name.endswith("running_var"):
            weights[name] = weights[name].abs() + 0.5
    missing, unexpected = model.double().load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)
    model.eval()  # theirs returns nothing
    return model, shapes


def digest(x: torch.Tensor) -> dict:
    """Mean, standard deviation and twelve values of a map, spread evenly over it."""
    flat = x.flatten()
    places = torch.linspace(0, len(flat) - 1, 12).long()
    return {"shape": list(x.shape), "mean": _short(x.mean()), "std": _short(x.std()), "places": places.tolist(),
            "values": [_short(v) for v in flat[places]]}  # fmt: skip


def _short(x) -> float:
    return float(f"{float(x):.15g}")


def classifier(checkout: Path, variant: str) -> dict:
    model, shapes = filled(authors_model(checkout, variant))
    maps = []
    for layer in model.layers:  # a layer's blocks end with the map of its stage; its merging belongs to the next
        layer.blocks[-1].register_forward_hook(lambda _, __, out: maps.append(out))
    with torch.no_grad():
        logits = model(generated_tensor("images", (1, 3, 224, 224), SEED) * 16)
    stages = [digest(m.transpose(1, 2).unflatten(2, (side, side))) for m, side in zip(maps, (56, 28, 14, 7))]
    return {"size": [224, 224], "shapes": shapes, "logits": [_short(v) for v in logits[0, ::8]], "stages": stages}


def dense(checkout: Path) -> dict:
    model = authors_dense(checkout).LITv2(**SIZES["small"], alpha=0.9, drop_path_rate=0.0)
    for name in ("norm0", "norm1", "norm2", "norm3"):
        setattr(model, name, nn.Identity())
    model, shapes = filled(model)
    with torch.no_grad():
        stages = model(generated_tensor("images", (1, 3, 75, 107), SEED) * 16)
    return {"size": [75, 107], "shapes": shapes, "stages": [digest(stage) for stage in stages]}


def hilo(cls: type, rows: int, columns: int, window: int) -> dict:
    model, shapes = filled(cls(**HILO, window_size=window))
    with torch.no_grad():
        y = model(generated_tensor("tokens", (2, rows * columns, HILO["dim"]), SEED) * 8, rows, columns)
    return {"grid": [rows, columns], "window_size": window, "shapes": shapes, **HILO,
            "output": digest(y.unflatten(1, (rows, columns)))}  # fmt: skip


def main() -> None:
    checkout = Path(sys.argv[1])
    dense_module = authors_dense(checkout)
    cases = {variant: classifier(checkout, variant) for variant in SIZES}
    cases["small_dense_75x107"] = dense(checkout)
    cases["hilo_6x10"] = hilo(_module(checkout / "hilo.py", "their_hilo").HiLo, 6, 10, 2)
    cases["hilo_dense_7x9"] = hilo(dense_module.HiLo, 7, 9, 4)
    OUT.mkdir(exist_ok=True)
    for case, figures in cases.items():
        content = {"authors_code": "ziplab/LITv2 7501c86", "seed": SEED, **figures}
        (OUT / f"{case}.json").write_text(json.dumps(content) + "\n")
        print(case, (OUT / f"{case}.json").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
