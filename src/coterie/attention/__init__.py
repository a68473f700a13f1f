"""The mechanisms: attention as `nn.Module`s on token grids (batch, *grid, dim), all called in the same way.

`create_attention(name, dim, num_heads, **options)` builds one of `list_attention()`; `replace_attention` puts one into
a timm ViT; `follow_learning_rate` lets centroids move with the optimizer, `initialize_centroids` starts them from data.
"""

from coterie.attention.agent import AgentAttention
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
from coterie.attention.cascaded_group import CascadedGroupAttention
from coterie.attention.centroids import CentroidFollower, MovingCentroids, follow_learning_rate
from coterie.attention.channel_group import ChannelGroupAttention
from coterie.attention.composable import ComposableMultiHeadAttention, KeyCache
from coterie.attention.cross_shaped_window import CrossShapedWindowAttention
from coterie.attention.dynamic_group import DynamicGroupAttention
from coterie.attention.global_ import GlobalAttention
from coterie.attention.head_maps import HeadMaps
from coterie.attention.hilo import HiLoAttention
from coterie.attention.kmeans import initialize_centroids
from coterie.attention.long_short_distance import LongShortDistanceAttention
from coterie.attention.replace import Replacement, replace_attention
from coterie.attention.shifted_window import ShiftedWindowAttention

__all__ = [
    "PATTERNS",
    "AgentAttention",
    "BiLevelRoutingAttention",
    "CascadedGroupAttention",
    "CentroidFollower",
    "ChannelGroupAttention",
    "ComposableMultiHeadAttention",
    "CrossShapedWindowAttention",
    "DynamicGroupAttention",
    "GlobalAttention",
    "GridAttention",
    "HeadMaps",
    "HiLoAttention",
    "KeyCache",
    "LongShortDistanceAttention",
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
