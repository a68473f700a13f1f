"""Small DCFormers for tests."""

import torch

from coterie.attention import HeadMaps
from coterie.models.dcformer import DCFormerConfig, DCFormerForCausalLM

PLUS = {
    "vocab_size": 29,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "sliding_window": 5,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
PYTHIA = {
    **PLUS,
    "norm": "layer",
    "parallel_residual": True,
    "gated_mlp": False,
    "hidden_act": "gelu",
    "qk_norm": False,
    "attention_bias": True,
    "mlp_bias": True,
    "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.5},
}
GROUPED = {**PLUS, "num_key_value_heads": 2, "layer_pattern": "LGLL", "mlp_gate_groups": 5, "static_composition": True}
CONFIGS = {"plus": PLUS, "pythia": PYTHIA, "grouped": GROUPED}


def small_dcformer(settings=PLUS, dtype=torch.float64, **different):
    """A model whose maps are far from the identity, so that what they do shows."""
    torch.manual_seed(0)
    model = DCFormerForCausalLM(DCFormerConfig(**{**settings, **different})).to(dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, HeadMaps):
                for parameter, std in module.initial_stds():
                    parameter.mul_(0.3 / std)
    return model


def token_ids(*shape, vocab=29, seed=1):
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))
