"""The arithmetic: pure functions on (batch, heads, tokens, head_dim) tensors, in the conventions of
`torch.nn.functional.scaled_dot_product_attention`. Each takes `backend="auto"`; `explain` tells what would run and
why."""

from coterie.ops._dispatch import BackendUnavailable, Explanation, explain, operations
from coterie.ops.bi_level_routing import bi_level_routing_attention, region_routing
from coterie.ops.composable import HeadComposition, composable_attention
from coterie.ops.dynamic_group import dynamic_group_attention, dynamic_groups, grouped_attention
from coterie.ops.gelu_depthwise import gelu_affine, gelu_depthwise

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "HeadComposition",
    "bi_level_routing_attention",
    "composable_attention",
    "dynamic_group_attention",
    "dynamic_groups",
    "explain",
    "gelu_affine",
    "gelu_depthwise",
    "grouped_attention",
    "operations",
    "region_routing",
]
