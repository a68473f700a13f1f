"""Agent-Swin: Swin Transformer in whose early stages agents attend over the whole map.

"Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874; authors' code
LeapLabTHU/Agent-Attention.

    image (B, 3, H, W)
      stem      4x4 patches, LN                                        (B, C, H/4, W/4)
      stage 1   agent blocks                                           (B, C, H/4, W/4)
      stage 2   2x2 patches joined, LN, linear, then agent blocks      (B, 2C, H/8, W/8)
      stage 3   the same; agent blocks, window blocks or both          (B, 4C, H/16, W/16)
      stage 4   the same, window blocks                                (B, 8C, H/32, W/32)
      head      LN, mean over positions, linear

    block       x = x + Attention(LN(x));  x = x + MLP(LN(x))
    agent       coterie.attention "agent", with biases and convolution, over the whole map ("window 56" in the paper)
    window      coterie.attention "shifted_window", with relative position bias; odd blocks shift

Maps of odd size and those that windows do not divide are filled up, and what fills them takes no part in attention. The
authors' code takes square images of one size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers import ClassifierHead, register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply
from torch import Tensor, nn

from coterie.attention import AgentAttention, GridAttention, ShiftedWindowAttention
from coterie.layers.layout import to_grid
from coterie.layers.padding import zero_padding
from coterie.models._checks import check_pyramid
from coterie.models._pyramid import AsGrid, drop_path_rates
from coterie.models._registry import register_vision_model
from coterie.models.agent_hosts import (
    PATCH,
    AgentPyramid,
    HostBlock,
    HostStage,
    PatchStem,
    grids_of,
    init_weights,
    per_stage,
    pretrained_cfg,
)

__all__ = ["AgentSwin"]

SMALLEST_WINDOW = 7
register_notrace_module(ShiftedWindowAttention)  # looks at shapes and masks, which torch.fx cannot follow


@register_notrace_module  # looks at shapes and masks, which torch.fx cannot follow
class PatchMerging(nn.Module):
    """The four tokens of each 2x2 patch joined, LN, linear; maps are filled up with zeros to whole patches.

    Shape: (batch, in_dim, H, W) -> token grid (batch, ceil(H / 2), ceil(W / 2), dim).
    """

    def __init__(self, in_dim: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * in_dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * in_dim, dim, bias=False, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns dim"]:
        """Merge tokens; padding is taken for zeros, as what is beyond the map."""
        x = to_grid(zero_padding(x, mask))
        rows, columns = x.shape[1:3]
        if rows % 2 or columns % 2:
            x = nn.functional.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        x = (
            x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        )  # a column of a patch, then the next
        return self.reduction(self.norm(x.flatten(3)))


class AgentSwin(AgentPyramid):
    """Swin Transformer with agent attention, with timm's model interface.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (timm's poolings).
        img_size: size of the images that biases and windows are made for, one number or (height, width). Images of
            any size are taken: biases are interpolated, windows stay as they are.
        dims, depths, num_heads: channels, blocks and heads of each stage.
        agents: agents along each side, one number per stage. A map with fewer tokens repeats some.
        agent_blocks: how many blocks of each stage, the first ones, have agent attention; the others have windows.
        window_size: tokens along each side of a window; None for an eighth of the first map, at least 7.
        mlp_ratio: hidden over outer channels of the feed-forward.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 over all blocks.

    Shape: image (batch, in_chans, height, width) of any size -> logits (batch, num_classes).
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        img_size: int | Sequence[int] = 224,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        agents: int | Sequence[int] = (3, 4, 7, 7),
        agent_blocks: int | Sequence[int] = (2, 2, 6, 0),
        window_size: int | None = None,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_pyramid(in_chans, num_classes, dims, depths, num_heads, PATCH, drop_rate, drop_path_rate)
        sides = per_stage("agents", agents, len(dims), least=1)
        first_ones = per_stage("agent_blocks", agent_blocks, len(dims), least=0)
        grids = grids_of(img_size, len(dims))
        window = max(SMALLEST_WINDOW, min(grids[0]) // 8) if window_size is None else window_size
        self.in_chans, self.num_classes, self.stem_stride = in_chans, num_classes, PATCH
        self.stem = PatchStem(in_chans, dims[0], **dd)
        stages = []
        for index, (dim, heads, grid) in enumerate(zip(dims, num_heads, grids)):
            blocks = []
            for number, rate in enumerate(drop_path_rates(drop_path_rate, depths)[index]):
                attn: GridAttention
                if number < first_ones[index]:
                    attn = AgentAttention(dim, heads, agents=sides[index], repeat=True, bias_size=grid, dwc=True, **dd)
                else:
                    size = min(window, *grid)
                    attn = ShiftedWindowAttention(
                        dim, heads, window_size=size, block_index=number, relative_position_bias=True, **dd
                    )
                blocks.append(HostBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, eps=1e-5, **dd))
            merging = PatchMerging(dims[index - 1], dim, **dd) if index else AsGrid()
            stages.append(HostStage(merging, blocks, stride=2 if index else 1))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": PATCH << index, "module": f"stages.{index}"} for index, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm: nn.Module = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        named_apply(init_weights, self)

    def own_name(self, name: str) -> str:
        """What a parameter of the authors is called here: they merge at the end of a stage, here a stage begins so."""
        part, _, rest = name.partition(".")
        if part == "patch_embed":
            return f"stem.{rest.replace('proj.', 'conv.')}"
        if part == "layers":
            stage, _, rest = rest.partition(".")
            return f"stages.{int(stage) + rest.startswith('downsample.')}.{rest}"
        return f"head.fc.{rest}" if part == "head" else name


default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg() for name in ("agent_swin_tiny", "agent_swin_small", "agent_swin_base")}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    kwargs.pop("dynamic_img_size", None)  # every size works
    feature_cfg = {"out_indices": tuple(range(len(kwargs["dims"]))), "flatten_sequential": True}
    return build_model_with_cfg(AgentSwin, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_SMALL: dict[str, Any] = {"dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_LARGE: dict[str, Any] = {"dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}


@register_vision_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-Swin-T: 28,902,964 parameters, 4.5 GMACs at 224 x 224; agents in the first three stages."""
    args = {**_SMALL, "depths": (2, 2, 6, 2), "agent_blocks": (2, 2, 6, 0)}
    return _create("agent_swin_tiny", pretrained, **{**args, **kwargs})


@register_vision_model
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-Swin-S: 49,666,684 parameters, 8.7 GMACs at 224 x 224; agents in the first two stages.

    With img_size=288 as published for that size: 49,707,964 parameters, 14.6 GMACs there.
    """
    args = {**_SMALL, "depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 0, 0)}
    return _create("agent_swin_small", pretrained, **{**args, **kwargs})


@register_vision_model
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-Swin-B: 88,095,096 parameters, 15.4 GMACs at 224 x 224; agents in two stages and two blocks of the third.

    With img_size=384 as published for that size: 88,305,016 parameters, 46.3 GMACs there.
    """
    args = {**_LARGE, "depths": (2, 2, 18, 2), "agent_blocks": (2, 2, 2, 0)}
    return _create("agent_swin_base", pretrained, **{**args, **kwargs})
