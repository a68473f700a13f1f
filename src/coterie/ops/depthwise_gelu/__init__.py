"""A 3x3 depthwise convolution and GELU: what a convolutional feed-forward does between its linear layers."""

from coterie.ops.depthwise_gelu.api import depthwise_gelu

__all__ = ["depthwise_gelu"]
