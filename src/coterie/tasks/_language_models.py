"""Causal language models by name: ours, and every one that transformers builds from a configuration."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch
from torch import nn

SMALL = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
"""What is built where nothing is said: between one and two million parameters, trained in minutes on two cores."""
INITIALIZER_RANGE = 0.02
"""For every architecture, so that they compare; DCFormerConfig's own default is the authors' 0.006."""


def language_model_config(name: str, options: dict[str, Any], text: Any) -> Any:
    """The configuration of a model for `text` (vocabulary, row length, end of a document).

    Args:
        name: "dcformer", one of its PRESETS, or a model type of transformers ("llama", "qwen3", "gpt_neox", ...).
        options: Fields of the configuration; they prevail.
        text: `coterie.data.text.TextFacts`.

    Raises:
        ValueError: an unknown name or option, or a model with too few positions or tokens for the text.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from coterie.models.dcformer import PRESETS, DCFormerConfig

    if name in PRESETS:
        kind: Any = DCFormerConfig
        values = dict(PRESETS[name])
    elif name == "dcformer":
        kind, values = DCFormerConfig, {**SMALL, "initializer_range": INITIALIZER_RANGE}
    elif name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = type(AutoConfig.for_model(name))
        values = {**SMALL, "initializer_range": INITIALIZER_RANGE}
        width = options.get("hidden_size", SMALL["hidden_size"])
        values["intermediate_size"] = -(-width * 8 // 3 // 256) * 256 if name != "gpt2" else 4 * width
        heads = options.get("num_attention_heads", SMALL["num_attention_heads"])
        values |= {"num_key_value_heads": heads, "head_dim": width // heads, "tie_word_embeddings": False}
        known = kind()
        values = {key: value for key, value in values.items() if hasattr(known, key)}
    else:
        near = difflib.get_close_matches(name, ["dcformer", *PRESETS, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"model {name!r}: takes dcformer, {', '.join(PRESETS)}, or a causal language model of transformers, "
            f"such as llama, qwen3 or gpt_neox{hint}"
        )
    values |= {"vocab_size": text.vocab_size, "max_position_embeddings": text.sequence_length,
               "bos_token_id": text.end, "eos_token_id": text.end, "pad_token_id": None}  # fmt: skip
    unknown = [key for key in options if not hasattr(kind(), key)]
    if unknown:
        raise ValueError(f"model.options.{unknown[0]}: {name} has no such field; see {kind.__name__}")
    config = kind(**{**values, **options})
    if config.max_position_embeddings < text.sequence_length:
        raise ValueError(
            f"rows have {text.sequence_length} tokens and the model {config.max_position_embeddings} positions; lower "
            "text.sequence_length or raise model.options.max_position_embeddings"
        )
    if config.vocab_size < text.vocab_size:
        raise ValueError(
            f"token ids go up to {text.vocab_size - 1} and the model's vocab_size is {config.vocab_size}; leave out "
            "model.options.vocab_size"
        )
    return config


def build_language_model(
    name: str | None, options: dict[str, Any], text: Any, parameters: int | None = None
) -> nn.Module:
    """The model, with random weights.

    Args:
        name, options, text: As `language_model_config`.
        parameters: Where given, the feed-forward is made as wide as brings the model nearest to so many parameters.

    Raises:
        ValueError: as `language_model_config`; documents are kept apart and the model takes no positions; or no width
            brings it near to `parameters`.
    """
    from transformers import AutoModelForCausalLM

    config = language_model_config(name or "dcformer", options, text)
    if parameters is not None:
        config = _with_parameters(config, parameters)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if text.separate and "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"model {name} takes no position_ids, which keep documents apart; take --text.attend_across true"
        )
    return model


def _with_parameters(config: Any, wanted: int) -> Any:
    import copy

    def at(width: int) -> int:
        changed = copy.deepcopy(config)
        changed.intermediate_size = width
        return count_parameters(_on_meta(changed))[0]

    if not hasattr(config, "intermediate_size"):
        raise ValueError(f"task.options.parameters: {config.model_type} has no intermediate_size to choose")
    groups = getattr(config, "mlp_gate_groups", None) or 1
    slope = (at(2 * groups) - at(groups)) / groups
    width = round((wanted - at(groups)) / slope / groups) * groups + groups
    if width < groups:
        raise ValueError(f"task.options.parameters is {wanted:,}; without feed-forward the model has {at(groups):,}")
    config = copy.deepcopy(config)
    config.intermediate_size = width
    return config


def _on_meta(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are not input or output embeddings."""
    embeddings = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # type: ignore[operator]
    total = sum(parameter.numel() for parameter in model.parameters())
    return total, total - sum(parameter.numel() for parameter in embeddings)


def describe_size(model: nn.Module, length: int) -> dict[str, Any]:
    """Parameters, and FLOPs of a training step per token: three times those of the forward pass.

    The forward pass counts two per multiply-add: every matrix once (the output embedding included, the input embedding
    is looked up), and for each token and head the scores and the weighted sum over the tokens it attends to on average
    in a row of `length`; of a DCFormer also the composition of each score and weight, 2 rank + 1 multiply-adds per head
    and side.
    """
    config: Any = model.config
    total, inner = count_parameters(model)
    lookup = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    output = model.get_output_embeddings().weight  # type: ignore[operator, union-attr]
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and p is not lookup and p is not output)
    forward = 2.0 * (matrices + output.numel())
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    composing = 0
    if config.model_type == "dcformer":
        sides = len(config.composition_sides) * (2 * config.composition_rank + 1)
        composing = len(config.composition_uses) * (sides + heads * config.static_composition)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    for kind in types:
        window = config.sliding_window if kind == "sliding_attention" else length
        keys = sum(min(place + 1, window) for place in range(length)) / length
        forward += 2 * keys * heads * (2 * head_dim + composing)
    return {
        "parameters": total,
        "parameters_without_embeddings": inner,
        "flops_per_token": round(3 * forward),
    }
