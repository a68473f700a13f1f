"""Dynamic group attention: queries cluster into groups, and each group attends to its own top-k keys."""

from coterie.ops.dynamic_group.api import dynamic_group_attention, dynamic_groups, grouped_attention

__all__ = ["dynamic_group_attention", "dynamic_groups", "grouped_attention"]
