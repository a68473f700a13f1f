"""Composable attention: heads whose scores and weights mix, by a map that differs per query and key."""

from coterie.ops.composable.api import composable_attention
from coterie.ops.composable.maps import HeadComposition

__all__ = ["HeadComposition", "composable_attention"]
