"""Agent-CSWin: CSWin Transformer in whose first two stages agents attend over the whole map.

"Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874; authors' code
LeapLabTHU/Agent-Attention.

    image (B, 3, H, W)
      stem      7x7 convolution with stride 4, LN                           (B, C, H/4, W/4)
      stage 1   agent blocks                                                (B, C, H/4, W/4)
      stage 2   3x3 convolution with stride 2, LN, agent blocks             (B, 2C, H/8, W/8)
      stage 3   the same, blocks of cross-shaped windows                    (B, 4C, H/16, W/16)
      stage 4   the same, global attention                                  (B, 8C, H/32, W/32)
      head      LN, mean over positions, linear

    block       x = x + Attention(LN(x));  x = x + MLP(LN(x)); every attention with a 3x3 convolution of the values

Maps that stripes do not divide are filled up, and what fills them takes no part in attention. The authors' code takes
square images of one size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers import ClassifierHead, register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply
from torch import Tensor, nn

from coterie.attention import AgentAttention, CrossShapedWindowAttention, GridAttention
from coterie.layers import ConvMerging
from coterie.layers.layout import to_grid, to_map
from coterie.layers.padding import zero_padding
from coterie.models._checks import check_pyramid
from coterie.models._pyramid import AsGrid, drop_path_rates
from coterie.models._registry import register_vision_model
from coterie.models.agent_hosts import (
    PATCH,
    AgentPyramid,
    HostBlock,
    HostStage,
    grids_of,
    init_weights,
    per_stage,
    pretrained_cfg,
)

__all__ = ["AgentCSWin"]

WHOLE = 1 << 20  # a stripe as wide as any map
EPS = 1e-5
register_notrace_module(CrossShapedWindowAttention)  # looks at shapes and masks, which torch.fx cannot follow


@register_notrace_module
class OverlappingStem(nn.Module):
    """7x7 convolution with stride 4, LN; images are filled up with zeros to a multiple of 4.

    Shape: (batch, in_chans, H, W) -> (batch, dim, ceil(H / 4), ceil(W / 4)), channels-last.
    """

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, PATCH, padding=2, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, eps=EPS, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """Embed the image; padding, where `mask` is False, is taken for zeros, as what is beyond the image."""
        x = zero_padding(x, mask)
        down, across = -x.shape[2] % PATCH, -x.shape[3] % PATCH
        x = nn.functional.pad(x, (0, across, 0, down)) if down or across else x
        return to_map(self.norm(to_grid(self.conv(x.contiguous(memory_format=torch.channels_last)))))


class AgentCSWin(AgentPyramid):
    """CSWin Transformer with agent attention, with timm's model interface.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (timm's poolings).
        img_size: size of the images that biases and stripes are made for, one number or (height, width). Images of any
            size are taken: biases are interpolated, stripes stay as they are.
        dims, depths, num_heads: channels, blocks and heads of each stage.
        agents: agents along each side, one number per stage. A map with fewer tokens repeats some.
        agent_stages: how many stages, the first ones, have agent attention. The others have cross-shaped windows, and
            the last one global attention.
        stripe_width: of the cross-shaped windows; None for a 32nd of the image, at least 7.
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
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        agents: int | Sequence[int] = (3, 4, 7, 7),
        agent_stages: int = 2,
        stripe_width: int | None = None,
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
        grids = grids_of(img_size, len(dims))
        width = max(7, min(grids[0]) // 8) if stripe_width is None else stripe_width
        self.in_chans, self.num_classes, self.stem_stride = in_chans, num_classes, PATCH
        self.stem = OverlappingStem(in_chans, dims[0], **dd)
        stages = []
        for index, (dim, heads, grid) in enumerate(zip(dims, num_heads, grids)):
            blocks = []
            for number, rate in enumerate(drop_path_rates(drop_path_rate, depths)[index]):
                attn: GridAttention
                if index < agent_stages:
                    attn = AgentAttention(dim, heads, agents=sides[index], repeat=True, bias_size=grid, dwc=True, **dd)
                else:
                    stripe = WHOLE if index == len(dims) - 1 else width
                    attn = CrossShapedWindowAttention(
                        dim, heads, stripe_width=stripe, block_index=number, lepe=True, **dd
                    )
                blocks.append(HostBlock(attn, mlp_ratio=mlp_ratio, drop_path=rate, eps=EPS, **dd))
            merging: nn.Module = AsGrid()
            if index:
                merging = ConvMerging(dims[index - 1], dim, **dd)
                merging.norm.eps = EPS
            stages.append(HostStage(merging, blocks, stride=2 if index else 1))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": PATCH << index, "module": f"stages.{index}"} for index, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm: nn.Module = nn.LayerNorm(self.num_features, eps=EPS, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        named_apply(init_weights, self)

    def joined(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' two branches as one: theirs has the vertical stripes in the first half of the channels, here
        they are in the second half; so the halves change places in `qkv`, in `proj` and in the convolutions."""
        joined = dict(state)
        for first in [name for name in state if ".attns.0.get_v." in name]:
            second = state.get(first.replace(".attns.0.", ".attns.1."))
            if second is None:
                continue
            block = first.partition(".attns.")[0]
            joined[first] = torch.cat([second, state[first]])
            del joined[first.replace(".attns.0.", ".attns.1.")]
            for kind in ("qkv.weight", "qkv.bias"):
                if f"{block}.{kind}" in state:
                    joined[f"{block}.{kind}"] = _swapped(state[f"{block}.{kind}"].unflatten(0, (3, -1)), 1).flatten(
                        0, 1
                    )
            if f"{block}.proj.weight" in state:
                joined[f"{block}.proj.weight"] = _swapped(state[f"{block}.proj.weight"], 1)
        return joined

    def own_name(self, name: str) -> str:
        """What a parameter of the authors is called here."""
        part, _, rest = name.partition(".")
        if part == "head":
            return f"head.fc.{rest}"
        if part == "stage1_conv_embed":
            return f"stem.{rest.replace('0.', 'conv.').replace('2.', 'norm.')}"
        if part.startswith("merge"):
            return f"stages.{part.removeprefix('merge')}.downsample.{rest}"
        if not part.startswith("stage") or not part[5:].isdigit():
            return name
        stage = int(part[5:]) - 1
        number, _, rest = rest.partition(".")
        block = f"stages.{stage}.blocks.{number}"
        if rest.startswith("attns.0."):
            own = next((n for n, _ in self.named_modules() if n == f"{block}.attn.dwc"), None)
            rest = rest.removeprefix("attns.0.").replace("get_v.", "dwc." if own else "lepe.")
            return f"{block}.attn.{rest}"
        return f"{block}.attn.{rest}" if rest.startswith(("qkv.", "proj.")) else f"{block}.{rest}"


def _swapped(value: Tensor, axis: int) -> Tensor:
    first, second = value.chunk(2, axis)
    return torch.cat([second, first], axis)


default_cfgs = generate_default_cfgs({f"agent_cswin_{size}": pretrained_cfg() for size in ("tiny", "small", "base")})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    kwargs.pop("dynamic_img_size", None)  # every size works
    feature_cfg = {"out_indices": tuple(range(len(kwargs["dims"]))), "flatten_sequential": True}
    return build_model_with_cfg(AgentCSWin, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_NARROW: dict[str, Any] = {"dims": (64, 128, 256, 512), "num_heads": (2, 4, 8, 16)}
_WIDE: dict[str, Any] = {"dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)}


@register_vision_model
def agent_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-CSWin-T: 20,458,672 parameters, 4.3 GMACs at 224 x 224; agents in the first two stages."""
    return _create("agent_cswin_tiny", pretrained, **{**_NARROW, "depths": (2, 4, 18, 1), **kwargs})


@register_vision_model
def agent_cswin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-CSWin-S: 32,814,100 parameters, 6.8 GMACs at 224 x 224; agents in the first two stages."""
    return _create("agent_cswin_small", pretrained, **{**_NARROW, "depths": (3, 6, 29, 2), **kwargs})


@register_vision_model
def agent_cswin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-CSWin-B: 73,249,696 parameters, 14.9 GMACs at 224 x 224; agents in the first two stages.

    With img_size=384 as published for that size: 73,328,416 parameters, 46.3 GMACs there.
    """
    return _create("agent_cswin_base", pretrained, **{**_WIDE, "depths": (3, 6, 29, 2), **kwargs})
