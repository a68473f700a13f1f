"""The smallest network with every part of a DGT, for tests that need a whole model."""

from typing import Any

import torch

from coterie.models import create_model


def small_dgt(seed: int = 0, **kwargs: Any) -> torch.nn.Module:
    """Four stages of one block each, 16 to 48 channels; at 32 x 32 the grids are 16, 8, 4 and 2 tokens a side."""
    torch.manual_seed(seed)
    shape = {"dims": (16, 16, 32, 48), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 3), "head_hidden_size": 24}
    return create_model("dgt_pico", **{"num_classes": 5, **shape, **kwargs})


def images(batch: int = 2, height: int = 32, width: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth random images, so that tokens are alike in places as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, -(-height // 4), -(-width // 4), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return smooth + 0.1 * torch.randn(batch, channels, height, width, generator=generator)
