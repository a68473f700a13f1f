"""Makes the figures in tests/golden/agent by running the authors' own code, in float64.

    python tests/golden/make_agent.py CHECKOUT

with a checkout of LeapLabTHU/Agent-Attention (commit 207ce3eb). Nothing of theirs is kept but figures: a file holds
names and shapes of their state, the seed of `coterie.testing.weights`, and for the image `image_of` the logits and a
few figures of each stage's map.

Their models take square images of one size only. So the second case of a model is an odd size for which theirs was
built anew: once with weights of its own, and for "resized" with those of the published size, put through their own
`load_pretrained`, which interpolates whatever is tied to a size.
"""

import json
import logging
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from coterie.testing import generated_tensor, generated_weights

OUT = Path(__file__).parent / "agent"
SEED = 20231214
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
NUM = [9, 16, 49, 49]
_SWIN = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "agent_num": NUM}
_CSWIN = {"agent_num": NUM, "attn_type": "AABB", "la_split_size": "56-28-14-7"}
# variant: module, its function or class, arguments; and those that go with another image size
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "agent_swin_tiny": ("agent_swin", "AgentSwinTransformer", {**_SWIN, "depths": [2, 2, 6, 2], "attn_type": "AAAB"}),
    "agent_swin_small": ("agent_swin", "AgentSwinTransformer", {**_SWIN, "attn_type": "AABB"}),
    "agent_swin_base": (
        "agent_swin",
        "AgentSwinTransformer",
        {**_SWIN, "embed_dim": 128, "num_heads": [4, 8, 16, 32], "attn_type": "AAMB2"},
    ),
    "agent_pvt_tiny": ("agent_pvt", "agent_pvt_tiny", {"agent_num": NUM}),
    "agent_pvt_small": ("agent_pvt", "agent_pvt_small", {"agent_num": NUM}),
    "agent_pvt_medium": ("agent_pvt", "agent_pvt_medium", {"agent_num": NUM}),
    "agent_pvt_large": ("agent_pvt", "agent_pvt_large", {"agent_num": NUM}),
    "agent_deit_tiny": ("agent_deit", "VisionTransformer", {"embed_dim": 192, "num_heads": 3, "agent_num": [49] * 4}),
    "agent_deit_small": ("agent_deit", "VisionTransformer", {"embed_dim": 384, "num_heads": 6, "agent_num": [49] * 4}),
    "agent_deit_base": (
        "agent_deit",
        "VisionTransformer",
        {"embed_dim": 768, "num_heads": 12, "agent_num": [81] * 4, "agent_layer": 4},
    ),
    "agent_cswin_tiny": ("agent_cswin", "Agent_CSWin_64_24181_tiny_224", _CSWIN),
    "agent_cswin_small": ("agent_cswin", "Agent_CSWin_64_36292_small_224", _CSWIN),
    "agent_cswin_base": ("agent_cswin", "Agent_CSWin_96_36292_base_224", _CSWIN),
}
# The sizes that their table names beside 224.
LARGER = {"agent_deit_small": 448, "agent_pvt_medium": 256, "agent_swin_small": 288, "agent_swin_base": 384,
          "agent_cswin_base": 384}  # fmt: skip
# case: variant, image size, size whose weights are resized (or None)
CASES = {
    "swin_tiny_224": ("agent_swin_tiny", 224, None),
    "swin_tiny_160": ("agent_swin_tiny", 160, 224),
    "pvt_tiny_224": ("agent_pvt_tiny", 224, None),
    "pvt_tiny_160": ("agent_pvt_tiny", 160, 224),
    "deit_tiny_224": ("agent_deit_tiny", 224, None),
    "deit_tiny_144": ("agent_deit_tiny", 144, 224),
    "cswin_tiny_224": ("agent_cswin_tiny", 224, None),
}


def authors_module(checkout: Path, name: str) -> types.ModuleType:
    """A module of their `agent_transformer/models` (or of `agent_transformer`), with stubs for what it needs of an
    old timm; without their package's `__init__`, which registers over timm's names."""
    import timm.layers
    import timm.models.vision_transformer

    folder = checkout / "agent_transformer"
    package = types.ModuleType("authors_models")
    package.__path__ = [str(folder / "models"), str(folder)]
    registry = types.ModuleType("timm.models.registry")
    registry.register_model = lambda function: function
    helpers = types.ModuleType("timm.models.helpers")
    for needed in ("build_model_with_cfg", "named_apply", "adapt_input_conv", "load_pretrained"):
        setattr(helpers, needed, None)
    stubs = {
        "authors_models": package,
        "timm.models.registry": registry,
        "timm.models.helpers": helpers,
        "timm.models.layers": timm.layers,
    }
    with mock.patch.dict(sys.modules, stubs):
        return __import__(f"authors_models.{name}", fromlist=[name])


def authors_model(checkout: Path, variant: str, **options: Any) -> nn.Module:
    """One of their models by our name for it.

    Args:
        checkout: the repository's folder.
        variant: a key of VARIANTS.
        **options: arguments of theirs, such as img_size, drop_path_rate or num_classes.
    """
    module, maker, settings = VARIANTS[variant]
    size = options.get("img_size", 224)
    if module == "agent_swin":  # as their configurations: windows as large as the first stage's map
        settings = {**settings, "window_size": size // 4}
    if module == "agent_deit":
        settings = {**settings, "norm_layer": partial(nn.LayerNorm, eps=1e-6)}
    if variant == "agent_cswin_base" and size == 384:
        maker, settings = "Agent_CSWin_96_36292_base_384", {**settings, "la_split_size": "96-48-24-12"}
    settings = {**settings, "drop_path_rate": 0.0, **options}
    return getattr(authors_module(checkout, module), maker)(**settings)


def image_of(size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The image of every case."""
    return generated_tensor(f"image_{size}", (1, 3, size, size), SEED, dtype=dtype) * size * 3**0.25


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of the whole state, buffers too."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def folded(shapes: dict[str, list[int]]) -> dict[str, str]:
    """Names that differ in their numbers only, as one: "a.#.w (3, 4)" -> "0 1 2"."""
    lines: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        numbers = NUMBER.findall(name)
        lines.setdefault(f"{NUMBER.sub('#', name)} {shape}", []).append(".".join(numbers))
    return {line: " ".join(numbers) for line, numbers in lines.items()}


def unfolded(lines: dict[str, str]) -> dict[str, list[int]]:
    """What `folded` was given."""
    shapes = {}
    for line, numbers in lines.items():
        name, _, shape = line.partition(" ")
        for number in numbers.split(" "):
            parts = zip(name.split("#"), [*number.split("."), ""])
            shapes["".join(part + place for part, place in parts)] = json.loads(shape)
    return shapes


def weights_of(model: nn.Module, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Generated parameters, and the buffers that the model made itself."""
    made = generated_weights(((name, p.shape) for name, p in model.named_parameters()), seed)
    return {name: made.get(name, tensor) for name, tensor in model.state_dict().items()}


def resized_weights(checkout: Path, variant: str, size: int, from_size: int) -> dict[str, torch.Tensor]:
    """The weights of `from_size`, as their loader puts them into a model of `size`."""
    import tempfile

    utils = authors_module(checkout, "utils")
    target = authors_model(checkout, variant, img_size=size).double()
    source = weights_of(authors_model(checkout, variant, img_size=from_size).double())
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({"model": source}, file.name)
        utils.load_pretrained(file.name, target, logging.getLogger("authors"))
    return target.state_dict()


def summary(feature: torch.Tensor) -> dict[str, Any]:
    """A few figures of a map."""
    flat = feature.flatten()
    places = [int(i) for i in torch.linspace(0, len(flat) - 1, 24).long()]
    return {"shape": list(feature.shape), "mean": float(flat.mean()), "std": float(flat.std()), "places": places,
            "values": [float(flat[i]) for i in places]}  # fmt: skip


def maps_of(model: nn.Module, variant: str, image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and what each stage's last block gives: (tokens, channels)."""
    module = VARIANTS[variant][0]
    if module == "agent_swin":
        last = [layer.blocks[-1] for layer in model.layers]
    elif module == "agent_pvt":
        last = [getattr(model, f"block{i}")[-1] for i in range(1, 5)]
    elif module == "agent_deit":
        last = [model.blocks[i] for i in (2, 5, 8, 11)]
    else:
        last = [getattr(model, f"stage{i}")[-1] for i in range(1, 5)]
    maps: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: maps.append(out[0])) for block in last]
    with torch.no_grad():
        logits = model(image)
    for hook in hooks:
        hook.remove()
    return logits, maps


def diffusion_figures(checkout: Path, rows: int = 6, columns: int = 8, dim: int = 24, heads: int = 3) -> dict[str, Any]:
    """Their patch for Stable Diffusion, on a self-attention of its shape: agents of merged tokens, and the output."""
    package = types.ModuleType("authors_agentsd")
    package.__path__ = [str(checkout / "agentsd")]
    with mock.patch.dict(sys.modules, {"authors_agentsd": package}):
        merge = __import__("authors_agentsd.merge", fromlist=["merge"])
        patch = __import__("authors_agentsd.patch", fromlist=["patch"])
    host = SelfAttention(dim, heads).double()
    host.load_state_dict(generated_weights(((n, p.shape) for n, p in host.named_parameters()), SEED))
    features = generated_tensor("features", (2, rows * columns, dim), SEED) * dim
    join, _ = merge.bipartite_soft_matching_random2d(features, columns, rows, 2, 2, 1, 38, no_rand=True)
    agents = join(features)[1]
    host.__class__ = patch.make_agent_attn(SelfAttention, 0.3, 0.075)
    host.set_new_params()
    with torch.no_grad():
        output = host(features, agent=agents)
    figures = {"grid": [rows, columns], "dim": dim, "heads": heads, "seed": SEED, "ratio": 38 / (rows * columns)}
    figures["agents"] = agents.sort(1).values.flatten()[::7].tolist()
    return {**figures, "output": output.flatten()[::9].tolist()}


class SelfAttention(nn.Module):
    """A self-attention as diffusers and the authors of Stable Diffusion name its parts."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0.0))


def main(checkout: Path) -> None:
    OUT.mkdir(exist_ok=True)
    (OUT / "diffusion.json").write_text(json.dumps(diffusion_figures(checkout)) + "\n")
    for case, (variant, size, from_size) in CASES.items():
        model = authors_model(checkout, variant, img_size=size).double().eval()
        state = weights_of(model) if from_size is None else resized_weights(checkout, variant, size, from_size)
        model.load_state_dict(state)
        logits, maps = maps_of(model, variant, image_of(size))
        figures = {
            "variant": variant,
            "size": size,
            "from_size": from_size,
            "seed": SEED,
            "logits": [float(value) for value in logits[0, :100]],
            "maps": [summary(feature) for feature in maps],
        }
        (OUT / f"{case}.json").write_text(json.dumps(figures) + "\n")
    shapes: dict[str, dict[str, dict[str, str]]] = {}
    for variant, (module, _, _) in VARIANTS.items():
        for size in (224, LARGER.get(variant)):
            if size:
                model = authors_model(checkout, variant, img_size=size)
                shapes.setdefault(module, {})[f"{variant}_{size}"] = folded(shapes_of(model))
    for module, lines in shapes.items():
        (OUT / f"{module}_shapes.json").write_text(json.dumps(lines, indent=0) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
