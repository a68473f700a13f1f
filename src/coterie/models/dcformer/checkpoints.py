"""The authors' checkpoints (Caiyun-AI/DCFormer-2.8B, Caiyun-AI/DCPythia-6.9B) as DCFormers of ours.

Their files hold, beside the weights, merged copies of the map weights (`dw_m`, `qkw_m`), identity matrices
(`pre_proj.w`, `post_proj.w`) and the buffers of a cache (`kv_cache`): all are left out. What is left is renamed, the
fused `wqkv` is split, and the map weights get the layout of `coterie.attention.HeadMaps`:

    dw1 (dim, 1, 4, K) -> maps.hidden.weight (4·K, dim)     dd (dim, 1, 4·N) -> maps.gate.weight (4·N, dim)
    qkw (1, 4, K, 2·R, N) -> maps.mix (4, K, 2·R, N)

Everything is read and checked before a model is made; nothing is unpickled beyond tensors.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from coterie.models.dcformer.configuration import DCFormerConfig
from coterie.models.dcformer.modeling import DCFormerForCausalLM

_PATTERNS = {"LGLL": "LGLL", "LGL6": "LGLLLLLL"}
_DROPPED = re.compile(r"(^|\.)(dw_m|qkw_m|sw|kv_cache\..*|causal_mask|freqs_cis)$")
_WHOLE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.mg": "mlp.group_gate",
}
_STREAMS = [("pre", "query"), ("pre", "key"), ("post", "query"), ("post", "key")]


def load_authors_checkpoint(
    folder: str | Path, *, config: DCFormerConfig | None = None, dtype: torch.dtype | None = None
) -> DCFormerForCausalLM:
    """Load a folder with the authors' `config.json` and weights (safetensors, or torch files, in any shards).

    Args:
        folder: local; nothing is downloaded.
        config: instead of the folder's config.json, for a folder without one.
        dtype: of the parameters; that of the files if None (float16 as published).

    Returns:
        The model, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: no such folder, no configuration, no weights, or a shard that the index names is not there.
        ValueError: a shard that is corrupt or cut short, a tensor that is missing, not known, or of another shape.
    """
    folder = Path(folder)
    if config is None:
        config = config_from_authors(_read_json(folder / "config.json"))
    theirs: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _tensors(path):
            if name in theirs:
                raise ValueError(f"{path}: the tensor {name} is in another file of the checkpoint too")
            theirs[name] = tensor
    state = convert_authors_state(theirs, config)
    with torch.device("meta"):
        model = DCFormerForCausalLM(config)
    _check_complete(state, model, folder)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def config_from_authors(theirs: Mapping[str, Any]) -> DCFormerConfig:
    """The authors' configuration (n_layer, n_head, dim, ...) in our words.

    Raises:
        ValueError: a key that must be there is not, or a value that means nothing here.
    """
    missing = [key for key in ("n_layer", "n_head", "dim", "vocab_size") if key not in theirs]
    if missing:
        raise ValueError(f"the configuration is not one of the authors' DCFormers: it has no {', '.join(missing)}")
    pythia = theirs.get("model_type") == "dcpythia" or "rotary_pct" in theirs
    pattern = theirs.get("window_type")
    if pattern is not None and pattern not in _PATTERNS:
        raise ValueError(f"window_type must be null, {' or '.join(_PATTERNS)}, got {pattern!r}")
    window = theirs.get("window_size", 256) if pattern is None else 256
    bias = pythia and bool(theirs.get("use_linear_bias", True))
    kv_heads = theirs.get("n_local_heads", -1)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(theirs.get("rope_base", 10000))}
    if pythia:
        rope["partial_rotary_factor"] = float(theirs.get("rotary_pct", 0.25))
    return DCFormerConfig(
        vocab_size=theirs["vocab_size"],
        hidden_size=theirs["dim"],
        intermediate_size=theirs.get("intermediate_size"),
        num_hidden_layers=theirs["n_layer"],
        num_attention_heads=theirs["n_head"],
        num_key_value_heads=None if kv_heads == -1 else kv_heads,
        hidden_act="gelu" if pythia else "silu",
        gated_mlp=not pythia,
        mlp_gate_groups=theirs.get("mgate_dim", 44) if theirs.get("mgate") else None,
        norm="layer" if pythia else "rms",
        norm_eps=theirs.get("norm_eps", 1e-5),
        parallel_residual=pythia and bool(theirs.get("use_parallel_residual", True)),
        attention_bias=bias,
        mlp_bias=bias,
        qk_norm=bool(theirs.get("use_qk_norm", False)),
        rope_parameters=rope,
        layer_pattern="G" if window is None else _PATTERNS.get(pattern or "", "LG"),
        sliding_window=window,
        composition_uses=("pre", "post") if theirs.get("use_dcmha", True) else (),
        composition_sides=("query",) if theirs.get("query_wise") else ("query", "key"),
        max_position_embeddings=theirs.get("block_size", 2048),
        bos_token_id=theirs.get("bos_token_id", 1),
        eos_token_id=theirs.get("eos_token_id", 2),
        pad_token_id=theirs.get("pad_token_id"),
        tie_word_embeddings=bool(theirs.get("tie_word_embeddings", False)),
    )


def convert_authors_state(theirs: Mapping[str, Tensor], config: DCFormerConfig) -> dict[str, Tensor]:
    """The authors' tensors under our names; what is only a copy or a buffer is left out.

    Raises:
        ValueError: a tensor that is not known here, or whose shape cannot be of this configuration.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if _DROPPED.search(name):
            _warn_of_trained_copy(name, tensor, theirs)
            continue
        if re.search(r"\.dyn_w_proj\.(pre|post)_proj\.w$", name):
            if not torch.equal(tensor.squeeze(0).float(), torch.eye(config.num_attention_heads)):
                raise ValueError(f"{name} is not the identity: a static branch, which no published checkpoint has")
            continue
        state.update(_renamed(name, tensor, config))
    return state


def _renamed(name: str, tensor: Tensor, config: DCFormerConfig) -> dict[str, Tensor]:
    """One tensor of theirs as ours: usually one, three of a fused one."""
    if name in _WHOLE:
        return {_WHOLE[name]: tensor}
    match = re.fullmatch(r"layers\.(\d+)\.(.+)\.(\w+)", name)
    if match is None:
        raise ValueError(f"the checkpoint's tensor {name} is not one of a DCFormer")
    layer, module, kind = match.groups()
    prefix = f"model.layers.{layer}"
    if module == "attention.wqkv":
        heads, kv_heads, head_dim = config.attention_shape
        rows = [n * head_dim for n in (heads, kv_heads, kv_heads)]
        if tensor.shape[0] != sum(rows):
            raise ValueError(f"{name} must have {sum(rows)} rows, got shape {tuple(tensor.shape)}")
        return {f"{prefix}.self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", tensor.split(rows))}
    if module == "attention.dyn_w_proj":
        return _renamed_map(f"{prefix}.self_attn.maps", name, kind, tensor, config)
    if module in ("feed_forward.w1", "feed_forward.w3"):
        first = "gate_proj" if config.gated_mlp else "up_proj"
        return {f"{prefix}.mlp.{first if module.endswith('w1') else 'up_proj'}.{kind}": tensor}
    if module not in _IN_LAYER:
        raise ValueError(f"the checkpoint's tensor {name} is not one of a DCFormer")
    return {f"{prefix}.{_IN_LAYER[module]}.{'weight' if kind == 'scale' else kind}": tensor}


def _renamed_map(prefix: str, name: str, kind: str, tensor: Tensor, config: DCFormerConfig) -> dict[str, Tensor]:
    """The map weights, for the streams that the configuration has (all four in the files)."""
    uses, sides = set(config.composition_uses), set(config.composition_sides)
    streams = [i for i, (use, side) in enumerate(_STREAMS) if use in uses and side in sides]
    dims = {"dw1": 4, "qkw": 5, "dd": 3}
    if kind not in dims:
        raise ValueError(f"the checkpoint's tensor {name} is not one of a DCFormer")
    groups = tensor.shape[0] if kind == "qkw" else tensor.shape[1] if tensor.ndim > 1 else 0
    if tensor.ndim != dims[kind] or groups != 1:
        raise ValueError(f"{name} must have {dims[kind]} dimensions and one group of heads, got {tuple(tensor.shape)}")
    if not streams:
        return {}
    if kind == "qkw":
        return {f"{prefix}.mix": tensor[0, streams].contiguous()}
    by_stream = tensor.flatten(1).t().unflatten(0, (4, -1))[streams]
    ours = "hidden" if kind == "dw1" else "gate"
    return {f"{prefix}.{ours}.weight": by_stream.flatten(0, 1).contiguous()}


def _warn_of_trained_copy(name: str, tensor: Tensor, theirs: Mapping[str, Tensor]) -> None:
    """The authors' training code trains the merged copies and leaves the weights proper as they were."""
    if not name.endswith("qkw_m"):
        return
    original = theirs.get(name.removesuffix("_m"))
    if original is not None and not torch.equal(original.reshape(tensor.shape).to(tensor.dtype), tensor):
        warnings.warn(
            f"{name} differs from {name.removesuffix('_m')}: the checkpoint was trained further with the authors' "
            "PyTorch code, which trains merged copies and drops them when it loads; as there, they are dropped",
            stacklevel=4,
        )


def _check_complete(state: Mapping[str, Tensor], model: DCFormerForCausalLM, folder: Path) -> None:
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    missing = [name for name in wanted if name not in state and name not in tied]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing from the checkpoint: {_some(missing)}")
    unknown = [name for name in state if name not in wanted]
    if unknown:
        raise ValueError(f"{folder}: the configuration has no place for {len(unknown)} tensors: {_some(unknown)}")
    for name, shape in wanted.items():
        if name in state and tuple(state[name].shape) != shape:
            raise ValueError(f"{folder}: {name} must have shape {shape}, got {tuple(state[name].shape)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _weight_files(folder: Path) -> list[Path]:
    """The shards of a checkpoint: those of its index, else all safetensors, else all torch files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            paths = [folder / name for name in sorted(set(_read_json(folder / index)["weight_map"].values()))]
            for path in paths:
                if not path.exists():
                    raise FileNotFoundError(f"{path} is not there, and {index} names it")
            return paths
    for patterns in (("*.safetensors",), ("*.bin", "*.pt", "*.pth")):
        found = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if found:
            return found
    raise FileNotFoundError(f"{folder} has no weights: no .safetensors, .bin, .pt or .pth file")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, or a ValueError that names it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the readers raise errors of half a dozen kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read; is it corrupt or cut short? ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors by name")
    yield from state.items()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
