"""The architectures. Importing this package registers the vision models with timm, for `timm.create_model`."""

from coterie.models import agent_cswin as agent_cswin  # registers them
from coterie.models import agent_deit as agent_deit  # registers them
from coterie.models import agent_pvt as agent_pvt  # registers them
from coterie.models import agent_swin as agent_swin  # registers them
from coterie.models import biformer_sizes as biformer_sizes  # registers them
from coterie.models import crossformer_sizes as crossformer_sizes  # registers them
from coterie.models import dgt_sizes as dgt_sizes  # registers them
from coterie.models import litv2_sizes as litv2_sizes  # registers them
from coterie.models._registry import create_model, list_models
from coterie.models.authors import LoadedCheckpoint, load_authors_checkpoint
from coterie.models.biformer import BiFormer
from coterie.models.crossformer import CrossFormer
from coterie.models.dcvit import ComposableVisionTransformer
from coterie.models.dgt import DynamicGroupTransformer
from coterie.models.litv2 import LITv2

__all__ = [
    "BiFormer",
    "ComposableVisionTransformer",
    "CrossFormer",
    "DynamicGroupTransformer",
    "LITv2",
    "LoadedCheckpoint",
    "create_model",
    "list_models",
    "load_authors_checkpoint",
]
