"""The mechanisms: attention as `nn.Module`s on token grids (batch, *grid, dim), all called in the same way.

`create_attention(name, dim, num_heads, **options)` builds one of `list_attention()`; `replace_attention` puts one into
a timm ViT; `follow_learning_rate` lets centroids move with the optimizer, `initialize_centroids` starts them from data.
"""

from coterie.attention.base import (
    PATTERNS,
    GridAttention,
    attention_class,
    attention_options,
    create_attention,
    list_attention,
    register_attention,
)
from coterie.attention.bi_level_routing import BiLevelRoutingAttention
from coterie.attention.centroids import CentroidFollower, MovingCentroids, follow_learning_rate
from coterie.attention.composable import ComposableMultiHeadAttention, KeyCache
from coterie.attention.cross_shaped_window import CrossShapedWindowAttention
from coterie.attention.dynamic_group import DynamicGroupAttention
from coterie.attention.global_ import GlobalAttention
from coterie.attention.head_maps import HeadMaps
from coterie.attention.kmeans import initialize_centroids
from coterie.attention.replace import Replacement, replace_attention
from coterie.attention.shifted_window import ShiftedWindowAttention

__all__ = [
    "PATTERNS",
    "BiLevelRoutingAttention",
    "CentroidFollower",
    "ComposableMultiHeadAttention",
    "CrossShapedWindowAttention",
    "DynamicGroupAttention",
    "GlobalAttention",
    "GridAttention",
    "HeadMaps",
    "KeyCache",
    "MovingCentroids",
    "Replacement",
    "ShiftedWindowAttention",
    "attention_class",
    "attention_options",
    "create_attention",
    "follow_learning_rate",
    "initialize_centroids",
    "list_attention",
    "register_attention",
    "replace_attention",
]
