"""DCFormer: language models whose attention heads compose, as transformers classes.

"Improving Transformers with Dynamically Composable Multi-Head Attention", arXiv 2405.08553 (ICML 2024). One family by
configuration: DCFormer++ (RMSNorm, SwiGLU, rotary positions, local and global layers in turn), its 8B form with a gated
feed-forward, and DCPythia (LayerNorm, parallel residual, partial rotary positions). Importing this package registers
the classes with transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` under the model type "dcformer".

    from coterie.models.dcformer import PRESETS, DCFormerConfig, DCFormerForCausalLM
    model = DCFormerForCausalLM(DCFormerConfig(**PRESETS["dcformer_405m"]))
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from coterie.models.dcformer.checkpoints import config_from_authors, load_authors_checkpoint
from coterie.models.dcformer.configuration import DCFormerConfig
from coterie.models.dcformer.modeling import DCFormerForCausalLM, DCFormerModel, DCFormerPreTrainedModel
from coterie.models.dcformer.presets import PRESETS

AutoConfig.register("dcformer", DCFormerConfig, exist_ok=True)
AutoModel.register(DCFormerConfig, DCFormerModel, exist_ok=True)
AutoModelForCausalLM.register(DCFormerConfig, DCFormerForCausalLM, exist_ok=True)

__all__ = [
    "PRESETS",
    "DCFormerConfig",
    "DCFormerForCausalLM",
    "DCFormerModel",
    "DCFormerPreTrainedModel",
    "config_from_authors",
    "load_authors_checkpoint",
]
