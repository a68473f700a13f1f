"""The architectures. Importing this package registers the vision models with timm, for `timm.create_model`."""

from coterie.models import dgt_sizes as dgt_sizes  # registers them
from coterie.models._registry import create_model, list_models
from coterie.models.authors import LoadedCheckpoint, load_authors_checkpoint
from coterie.models.dcvit import ComposableVisionTransformer
from coterie.models.dgt import DynamicGroupTransformer

__all__ = [
    "ComposableVisionTransformer",
    "DynamicGroupTransformer",
    "LoadedCheckpoint",
    "create_model",
    "list_models",
    "load_authors_checkpoint",
]
