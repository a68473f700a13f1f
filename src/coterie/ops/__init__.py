"""The arithmetic: pure functions on (batch, heads, tokens, head_dim) tensors, in the conventions of
`torch.nn.functional.scaled_dot_product_attention`. Each takes `backend="auto"`; `explain` tells what would run and
why."""

from coterie.ops._dispatch import BackendUnavailable, Explanation, explain, operations
from coterie.ops.bi_level_routing import bi_level_routing_attention, region_routing
from coterie.ops.biased_group_attention import biased_group_attention
from coterie.ops.cascaded_group import cascaded_group_attention
from coterie.ops.composable import HeadComposition, composable_attention
from coterie.ops.deformable import deformable_patches
from coterie.ops.depthwise_gelu import depthwise_gelu
from coterie.ops.dynamic_group import dynamic_group_attention, dynamic_groups, grouped_attention
from coterie.ops.gelu_depthwise import gelu_affine, gelu_depthwise

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "HeadComposition",
    "bi_level_routing_attention",
    "biased_group_attention",
    "cascaded_group_attention",
    "composable_attention",
    "deformable_patches",
    "depthwise_gelu",
    "dynamic_group_attention",
    "dynamic_groups",
    "explain",
    "gelu_affine",
    "gelu_depthwise",
    "grouped_attention",
    "operations",
    "region_routing",
]
