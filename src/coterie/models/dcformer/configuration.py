"""Configuration of DCFormer++ and DCPythia. Fields that transformers' Llama has are named as there."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

LAYERS = {"L": "sliding_attention", "G": "full_attention"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@strict
class DCFormerConfig(PreTrainedConfig):
    """What a DCFormer is made of; the defaults are DCFormer++ 405M.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, max_position_embeddings: as usual.
        intermediate_size: width of the feed-forward; if None, 4 hidden_size, of which 2/3 (rounded up to a multiple of
            256) if it is gated.
        num_key_value_heads: a divisor of `num_attention_heads`, which is the default.
        head_dim: channels of a head; hidden_size / num_attention_heads if None.
        hidden_act: activation of the feed-forward.
        gated_mlp: SwiGLU's two-branch feed-forward, or a plain one.
        mlp_gate_groups: so many equal groups of feed-forward channels are weighted by a softmax over the groups (44 in
            the authors' 8B model); None for no such gate.
        norm: "rms" or "layer"; norm_eps: its epsilon.
        parallel_residual: attention and feed-forward both read the block's input (GPT-NeoX, Pythia).
        attention_bias, mlp_bias: whether the projections of attention and feed-forward have biases.
        qk_norm: RMS-normalise queries and keys per head (eps 1e-6).
        rope_parameters: transformers' dict, with "rope_theta" and, for partial rotation, "partial_rotary_factor"; types
            default, linear, llama3 and yarn.
        layer_pattern: local (L) and global (G) layers, repeated over the depth: "LG", "LGLL", "G", ...
        layer_types: the same, layer by layer, in transformers' words; made from `layer_pattern` if None.
        sliding_window: keys that a token of a local layer attends to, itself counted.
        composition_rank: rank of a token's map over the heads, beside its diagonal.
        composition_uses: out of "pre" (scores compose) and "post" (weights compose); none gives plain attention.
        composition_sides: out of "query" and "key": which of the two tokens of a pair give maps.
        static_composition: whether there are learned maps beside those of the tokens.
        composition_gelu: GELU of the maps' hidden layer, "none" (erf) or "tanh", as the authors' JAX training code has.
        initializer_range: standard deviation of all matrices but those of the maps, which have the paper's own.
    """

    model_type = "dcformer"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 50256
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    mlp_gate_groups: int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    parallel_residual: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = True
    rope_parameters: dict | None = None
    layer_pattern: str = "LG"
    layer_types: list[str] | None = None
    sliding_window: int | None = 256
    composition_rank: int = 2
    composition_uses: list[str] | tuple[str, ...] = ("pre", "post")
    composition_sides: list[str] | tuple[str, ...] = ("query", "key")
    static_composition: bool = False
    composition_gelu: str = "none"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.006
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        _check_at_least_1(
            self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"
        )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    "num_attention_heads must divide hidden_size where head_dim is not given, got "
                    f"num_attention_heads={self.num_attention_heads} and hidden_size={self.hidden_size}"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.intermediate_size is None:
            width = 4 * self.hidden_size
            self.intermediate_size = -(-(width * 2 // 3) // 256) * 256 if self.gated_mlp else width
        if self.layer_types is None:
            self.layer_types = _layer_types(self.layer_pattern, self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self._check_values()  # not by transformers' validation, which wraps errors in one of its own

    def _check_values(self) -> None:
        """The values fit each other."""
        _check_at_least_1(self, "num_key_value_heads", "head_dim", "intermediate_size", "composition_rank")
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads, got {self.num_key_value_heads} "
                f"and {self.num_attention_heads}"
            )
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm must be 'rms' or 'layer', got {self.norm!r}")
        if self.mlp_gate_groups is not None:
            _check_at_least_1(self, "mlp_gate_groups")
            if (self.intermediate_size or 0) % self.mlp_gate_groups:
                raise ValueError(
                    f"mlp_gate_groups must divide intermediate_size, got {self.mlp_gate_groups} "
                    f"and {self.intermediate_size}"
                )
        unknown = sorted(set(self.layer_types or ()) - set(LAYERS.values()))
        if unknown:
            raise ValueError(f"layer_types must be out of {', '.join(LAYERS.values())}, got {', '.join(unknown)}")
        if "sliding_attention" in (self.layer_types or ()):
            if self.sliding_window is None:
                raise ValueError("sliding_window must be given where there are local layers, got None")
            _check_at_least_1(self, "sliding_window")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                "the channels that rotate must be even and at least 2, "
                f"got {self.rotary_dim} of head_dim={self.head_dim}"
            )

    @property
    def attention_shape(self) -> tuple[int, int, int]:
        """Query heads, key and value heads, channels of a head."""
        return self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads, self.head_dim or 0

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that rotate with the position."""
        return int((self.head_dim or 0) * (self.rope_parameters or {}).get("partial_rotary_factor", 1.0))

    @property
    def window_of(self) -> dict[str, int | None]:
        """The window of each type of layer."""
        return {"sliding_attention": self.sliding_window, "full_attention": None}


def _layer_types(pattern: str, layers: int) -> list[str]:
    if not pattern or set(pattern) - set(LAYERS):
        raise ValueError(f"layer_pattern must be of the letters L (local) and G (global), got {pattern!r}")
    return [LAYERS[pattern[i % len(pattern)]] for i in range(layers)]


def _check_at_least_1(config: DCFormerConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
