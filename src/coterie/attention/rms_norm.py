"""RMS normalisation (arXiv 1910.07467) that keeps the input's dtype under autocast, and the weight's precision."""

from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, computed in the weight's dtype where that differs from the input's; the output has the input's."""

    def forward(self, x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
