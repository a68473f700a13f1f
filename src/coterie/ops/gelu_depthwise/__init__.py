"""GELU, a scale and shift per channel, identity plus depthwise convolution, GELU: the middle of an inverted residual
feed-forward. And its first two alone."""

from coterie.ops.gelu_depthwise.api import gelu_affine, gelu_depthwise

__all__ = ["gelu_affine", "gelu_depthwise"]
