"""Parts that architectures share: stems, patch merging, feed-forwards, position encodings, heads.

Images and feature maps are (batch, channels, height, width) in channels-last memory; token grids are
(batch, height, width, channels), contiguous. The one is a view of the other: going between them copies nothing.
"""

from coterie.layers.conv_head import ConvHead
from coterie.layers.feed_forward import InvertedResidualFeedForward
from coterie.layers.patch_merging import ConvMerging
from coterie.layers.position import ConditionalPositionEncoding
from coterie.layers.stem import ConvStem

__all__ = [
    "ConditionalPositionEncoding",
    "ConvHead",
    "ConvMerging",
    "ConvStem",
    "InvertedResidualFeedForward",
]
