"""The published sizes, as arguments of `DCFormerConfig`; parameters as the authors' PyTorch classes have them."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # 419,516,416 parameters. "DCFormer++ 405M" of the paper's scaling study; configuration in the authors' JAX code.
    "dcformer_405m": {
        "vocab_size": 50256,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "norm_eps": 1e-5,
    },
    # 2,849,567,232 parameters. Weights: Caiyun-AI/DCFormer-2.8B.
    "dcformer_2.8b": {
        "vocab_size": 50257,
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "norm_eps": 1e-6,
    },
    # 6,941,859,840 parameters. Weights: Caiyun-AI/DCPythia-6.9B.
    "dcpythia_6.9b": {
        "vocab_size": 50257,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "gelu",
        "gated_mlp": False,
        "norm": "layer",
        "norm_eps": 1e-5,
        "parallel_residual": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    # 7,926,857,728 parameters. The authors' config.json; no weights are published.
    "dcformer_8b": {
        "vocab_size": 152064,
        "hidden_size": 4096,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "mlp_gate_groups": 44,
        "norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "layer_pattern": "LGLL",
        "max_position_embeddings": 4096,
    },
}
