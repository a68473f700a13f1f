"""Attention inside disjoint groups of tokens, with a bias per head and pair of places in a group."""

from coterie.ops.biased_group_attention.api import BIASED_GROUP_ATTENTION, biased_group_attention

__all__ = ["BIASED_GROUP_ATTENTION", "biased_group_attention"]
