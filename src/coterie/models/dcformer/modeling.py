"""DCFormer as transformers classes: a Llama or GPT-NeoX block whose attention heads compose.

arXiv 2405.08553 (ICML 2024); the authors' code is Caiyun-AI/DCFormer. Module names follow transformers' Llama; what a
Llama has not is `self_attn.maps`, the maps over the heads that every token gives.

The cache holds, beside a key, the 2·rank + 1 numbers per query head that its pre-softmax map is made of, as further
channels, and beside a value those of its post-softmax map: 10 numbers per head and token. So every cache of
transformers (dynamic, static, sliding, offloaded, beam search) works as it is.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from coterie.attention.head_maps import HeadMaps, key_part, with_key_part
from coterie.attention.rms_norm import RMSNorm
from coterie.attention.rotary import rotary_frequencies, rotary_tables, rotate
from coterie.models.dcformer.configuration import DCFormerConfig
from coterie.models.dcformer.masks import LayerMask, layer_masks, masks_for_generation
from coterie.ops import composable_attention


class DCFormerAttention(nn.Module):
    """Causal self-attention with composing heads, rotary positions, and the cache."""

    def __init__(self, config: DCFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.kv_heads, self.head_dim = config.attention_shape
        self.scaling = self.head_dim**-0.5
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=1e-6) if config.qk_norm else nn.Identity()
        self.maps = HeadMaps(
            config.hidden_size,
            self.heads,
            rank=config.composition_rank,
            uses=tuple(config.composition_uses),
            sides=tuple(config.composition_sides) if config.composition_uses else (),
            static=config.static_composition,
            approximate=config.composition_gelu,
        )

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        rotary: tuple[Tensor, Tensor],
        mask: LayerMask,
        past_key_values: Cache | None = None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch heads tokens keys"] | None]:
        """The output, and the composed weights where the attention implementation is "eager"."""
        query, key, value = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(self.q_norm(query), *rotary).to(value.dtype)
        key = rotate(self.k_norm(key), *rotary).to(value.dtype)
        pre, post = self.maps(hidden_states)
        if past_key_values is not None:
            key, value = past_key_values.update(
                self._packed(key, key_part(pre)), self._packed(value, key_part(post)), self.layer_idx
            )
            (key, pre_part), (value, post_part) = self._unpacked(key), self._unpacked(value)
            pre, post = with_key_part(pre, pre_part), with_key_part(post, post_part)
        options = {
            "is_causal": mask.is_causal,
            "window": mask.window,
            "attn_mask": mask.of(key.shape[2]),
            "scale": self.scaling,
        }
        weights = None
        if self.config._attn_implementation == "eager":  # the weights are the output for one-hot values
            one_hot = torch.eye(key.shape[2], device=key.device, dtype=key.dtype).expand(*key.shape[:2], -1, -1)
            weights = composable_attention(query, key, one_hot, pre, post, backend="reference", **options)
            y = weights @ value.repeat_interleave(self.heads // self.kv_heads, dim=1)
        else:
            y = composable_attention(query, key, value, pre, post, **options)
        return self.o_proj(y.transpose(1, 2).flatten(2)), weights

    def _packed(
        self, x: Float[Tensor, "batch kv_heads tokens head_dim"], part: Float[Tensor, "batch tokens n heads"] | None
    ) -> Float[Tensor, "batch kv_heads tokens channels"]:
        """Keys or values with their maps as further channels: those of the query heads that read this head."""
        if part is None:
            return x
        part = part.to(x.dtype).unflatten(-1, (self.kv_heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)
        return torch.cat([x, part], dim=-1)

    def _unpacked(
        self, x: Float[Tensor, "batch kv_heads keys channels"]
    ) -> tuple[Float[Tensor, "batch kv_heads keys head_dim"], Float[Tensor, "batch keys n heads"] | None]:
        if x.shape[-1] == self.head_dim:
            return x, None
        part = x[..., self.head_dim :].unflatten(-1, (-1, self.heads // self.kv_heads))
        return x[..., : self.head_dim], part.permute(0, 2, 3, 1, 4).flatten(3)


class DCFormerMLP(nn.Module):
    """The feed-forward: SwiGLU or plain, its channels optionally weighted group by group."""

    def __init__(self, config: DCFormerConfig) -> None:
        super().__init__()
        width = config.intermediate_size or 0
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        groups = config.mlp_gate_groups
        self.group_gate = None if groups is None else nn.Linear(config.hidden_size, groups, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        if self.gate_proj is None:
            hidden = self.act_fn(self.up_proj(x))
        else:
            hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if self.group_gate is not None:
            logits = self.group_gate(x)
            wide = torch.promote_types(logits.dtype, torch.float32)
            shares = logits.softmax(-1, dtype=wide).to(hidden.dtype)
            hidden = (hidden.unflatten(-1, (shares.shape[-1], -1)) * shares.unsqueeze(-1)).flatten(-2)
        return self.down_proj(hidden)


class DCFormerDecoderLayer(GradientCheckpointingLayer):
    """A block: attention, then feed-forward, or both side by side."""

    def __init__(self, config: DCFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.self_attn = DCFormerAttention(config, layer_idx)
        self.mlp = DCFormerMLP(config)
        self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch tokens dim"],
        rotary: tuple[Tensor, Tensor],
        mask: LayerMask,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), rotary, mask, past_key_values)
        if self.parallel_residual:
            return self.mlp(self.post_attention_layernorm(hidden_states)) + attended + hidden_states
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DCFormerPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about a DCFormer."""

    config_class = DCFormerConfig
    config: DCFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DCFormerDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True  # everything but "eager" is coterie.ops.composable_attention
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DCFormerDecoderLayer, "attentions": DCFormerAttention}  # noqa: RUF012
    create_masks_for_generate = staticmethod(masks_for_generation)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # between "sdpa" and "eager"; transformers would look for its own attention functions

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HeadMaps):  # after its own linear layers: these have standard deviations of their own
            for parameter, std in module.initial_stds():
                init.normal_(parameter, std=std)


class DCFormerModel(DCFormerPreTrainedModel):
    """The decoder: tokens to hidden states."""

    def __init__(self, config: DCFormerConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DCFormerDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token; arguments as transformers' decoders take them.

        `position_ids` that start anew, without cache and attention mask, mark documents packed into one row, which
        do not see each other.

        Raises:
            ValueError: token ids outside the vocabulary (looked at on the CPU), a sequence beyond
                `max_position_embeddings`, a mask of another shape or of nothing but padding.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            _check_ids(input_ids, self.config.vocab_size)
            inputs_embeds = self.embed_tokens(input_ids)
        embeds: Tensor = inputs_embeds
        masks = self._masks(embeds, attention_mask, past_key_values, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(embeds.shape[1], device=embeds.device) + seen).unsqueeze(0)
        rotary = self._rotary(position_ids, embeds.dtype)
        hidden_states = embeds
        for layer, kind in zip(self.layers, self.config.layer_types or ()):
            hidden_states = layer(hidden_states, rotary, masks[kind], past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _masks(
        self, embeds: Tensor, attention_mask: Any, past: Cache | None, position_ids: Tensor | None
    ) -> dict[str, LayerMask]:
        seen = 0 if past is None else past.get_seq_length()
        if position_ids is None or past is not None:
            length = seen + embeds.shape[1] if isinstance(seen, int) else 0  # a static cache has a length of its own
        else:  # of documents packed into one row, each has its own positions
            length = 1 + int(position_ids.max()) if _may_look_at(position_ids) else 0
        longest = self.config.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"the sequence has {length} tokens, and max_position_embeddings is {longest}: "
                "shorten it, or raise max_position_embeddings in the configuration"
            )
        return layer_masks(self.config, embeds, attention_mask, past, position_ids)

    def _rotary(self, position_ids: Int[Tensor, "batch tokens"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (batch, 1, tokens, rotary_dim) in the model's dtype, made in float32 at least."""
        parameters, scale = self.config.rope_parameters or {}, 1.0
        if parameters.get("rope_type", "default") == "default":
            wide = torch.promote_types(dtype, torch.float32)
            base = parameters.get("rope_theta", 10000.0)
            frequencies = rotary_frequencies(self.config.rotary_dim, base, device=position_ids.device, dtype=wide)
        else:
            frequencies, scale = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](self.config, position_ids.device)
        cos, sin = rotary_tables(position_ids.unsqueeze(1), frequencies)
        return (cos * scale).to(dtype), (sin * scale).to(dtype)


class DCFormerForCausalLM(DCFormerPreTrainedModel, GenerationMixin):
    """The decoder with a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DCFormerConfig) -> None:
        super().__init__(config)
        self.model = DCFormerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, tokens, vocab_size), and the mean next-token loss if `labels` are given.

        `labels` are the input ids themselves (the shift happens inside), with -100 where there is nothing to predict.
        `logits_to_keep`: the last so many tokens only, or the given ones; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _norm(config: DCFormerConfig) -> nn.Module:
    return (RMSNorm if config.norm == "rms" else nn.LayerNorm)(config.hidden_size, eps=config.norm_eps)


def _check_ids(input_ids: Tensor | None, vocab_size: int) -> None:
    if input_ids is None or not _may_look_at(input_ids):
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids must be from 0 to {vocab_size - 1}, the vocabulary, got {low} to {high}")


def _may_look_at(ids: Tensor) -> bool:
    """Whether values can be had at no cost: not on a GPU, which would have to be waited for, nor while tracing."""
    return ids.device.type == "cpu" and not is_tracing(ids) and ids.numel() > 0
