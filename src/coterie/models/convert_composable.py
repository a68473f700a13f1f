"""Turning a trained transformer into its composable form, with the same outputs, ready to be trained further.

Every attention gets maps over its heads (`coterie.attention.HeadMaps`) that start as the identity, so that the model
is what it was; from there they can be learned. Taken are transformers' Llama and GPT-NeoX (Pythia), which become
DCFormers, and timm's VisionTransformer (ViT, DeiT), whose blocks get "composable" attention.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coterie.attention import HeadMaps, replace_attention

if TYPE_CHECKING:
    from coterie.models.dcformer import DCFormerConfig

_LLAMA_WORDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rope_parameters",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
)


def to_composable(
    model: nn.Module,
    *,
    rank: int = 2,
    uses: tuple[str, ...] = ("pre", "post"),
    sides: tuple[str, ...] = ("query", "key"),
    static: bool = False,
) -> nn.Module:
    """The composable form of a model, with the outputs that it had.

    Args:
        model: LlamaModel, LlamaForCausalLM, GPTNeoXModel or GPTNeoXForCausalLM of transformers, or a VisionTransformer
            of timm. Its parameters are handed over, not copied: do not use it on its own afterwards (timm's is changed
            in place and returned).
        rank, uses, sides, static: of the maps, as `coterie.attention.HeadMaps` takes them.

    Returns:
        A DCFormerModel or DCFormerForCausalLM, or the VisionTransformer.

    Raises:
        TypeError: a model of another kind.
        ValueError: one with something that has no counterpart, dropout on attention weights for example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    head = type(model).__name__.removeprefix("Llama").removeprefix("GPTNeoX")
    if kind in ("llama", "gpt_neox") and head in ("Model", "ForCausalLM"):
        config = (_config_of_llama if kind == "llama" else _config_of_neox)(model.config)
        config.composition_rank, config.composition_uses = rank, tuple(uses)
        config.composition_sides, config.static_composition = tuple(sides), static
        return _language_model(model, config, _llama_state if kind == "llama" else _neox_state)
    if hasattr(model, "blocks") and hasattr(model, "patch_embed"):
        report = replace_attention(
            model, "composable", rank=rank, uses=uses, sides=sides, static=static, initial="zero"
        )
        for name, reason in report.skipped.items():
            raise ValueError(f"{name} cannot be composable: {reason}")
        if report.swapped:
            return model
    raise TypeError(
        "model must be a Llama or GPT-NeoX of transformers (Model or ForCausalLM) or a VisionTransformer of timm, "
        f"got {type(model).__name__}"
    )


def _language_model(
    model: Any, config: "DCFormerConfig", renamed: Callable[[Any], Iterator[tuple[str, Tensor]]]
) -> nn.Module:
    """A DCFormer of this configuration with the model's parameters and identity maps."""
    from coterie.models.dcformer import DCFormerForCausalLM, DCFormerModel

    causal = type(model).__name__.endswith("ForCausalLM")
    with torch.device("meta"):
        new = (DCFormerForCausalLM if causal else DCFormerModel)(config)
    state = dict(renamed(model))
    if not causal:
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    missing, unknown = new.load_state_dict(state, strict=False, assign=True)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    missing = [name for name in missing if ".maps." not in name and name not in tied]
    if missing or unknown:
        raise ValueError(f"{type(model).__name__} has no counterpart: missing {missing[:4]}, unknown {unknown[:4]}")
    new.tie_weights()
    example = next(model.parameters())
    for module in new.modules():
        if isinstance(module, HeadMaps):
            module.to_empty(device=example.device).to(example.dtype)
            module.reset_parameters()
            module.set_identity()
    if causal:
        new.generation_config = model.generation_config
    return new.train(model.training)


def _config_of_llama(config: Any) -> "DCFormerConfig":
    _refuse_dropout(config, "attention_dropout")
    return _config(
        config,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        mlp_bias=config.mlp_bias,
    )


def _config_of_neox(config: Any) -> "DCFormerConfig":
    _refuse_dropout(config, "attention_dropout", "hidden_dropout")
    return _config(
        config,
        gated_mlp=False,
        norm="layer",
        norm_eps=config.layer_norm_eps,
        parallel_residual=config.use_parallel_residual,
        mlp_bias=True,
    )


def _config(config: Any, **different: Any) -> "DCFormerConfig":
    from coterie.models.dcformer import DCFormerConfig

    same = {word: getattr(config, word) for word in _LLAMA_WORDS}
    return DCFormerConfig(**same, qk_norm=False, layer_pattern="G", **different)


def _refuse_dropout(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name, 0):
            raise ValueError(f"{name} has no counterpart here: set it to 0 first, got {getattr(config, name)}")


def _llama_state(model: Any) -> Iterator[tuple[str, Tensor]]:
    prefix = "" if hasattr(model, "model") else "model."
    for name, parameter in model.named_parameters():
        yield prefix + name, parameter.detach()


_NEOX_WORDS = {
    "gpt_neox.embed_in": "model.embed_tokens",
    "gpt_neox.final_layer_norm": "model.norm",
    "gpt_neox.layers": "model.layers",
    "attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}


def _neox_state(model: Any) -> Iterator[tuple[str, Tensor]]:
    """GPT-NeoX fuses query, key and value head by head."""
    heads = model.config.num_attention_heads
    for name, parameter in model.named_parameters():
        ours = name if name.startswith(("gpt_neox.", "lm_head.")) else f"gpt_neox.{name}"
        for their_word, our_word in _NEOX_WORDS.items():
            ours = ours.replace(their_word, our_word)
        if "attention.query_key_value" in ours:
            fused = parameter.detach().unflatten(0, (heads, 3, -1))
            for i, part in enumerate("qkv"):
                yield ours.replace("attention.query_key_value", f"self_attn.{part}_proj"), fused[:, i].flatten(0, 1)
        else:
            yield ours, parameter.detach()
