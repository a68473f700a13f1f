"""Cascaded group attention between its input and its output projection: EfficientViT's heads, one after the other."""

from coterie.ops.cascaded_group.api import cascaded_group_attention

__all__ = ["cascaded_group_attention"]
