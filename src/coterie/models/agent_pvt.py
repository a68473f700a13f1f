"""Agent-PVT: Pyramid Vision Transformer with agent attention instead of attention to a coarser map.

"Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874; authors' code
LeapLabTHU/Agent-Attention.

    image (B, 3, H, W)
      stem      4x4 patches, LN                                           (B, C_1, H/4, W/4)
      stage 1   position table, agent blocks                              (B, C_1, H/4, W/4)
      stage i   2x2 patches, LN, position table, agent blocks             (B, C_i, H/2^(i+1), W/2^(i+1))
      head      mean over positions, linear; no norm

    block       x = x + Attention(LN(x));  x = x + MLP(LN(x))
    attention   coterie.attention "agent", with biases and convolution, keys and values at full resolution

Maps of odd size are filled up with zeros to whole patches; the authors' convolutions drop a last row or column.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers import ClassifierHead, register_notrace_module, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply
from torch import Tensor, nn

from coterie.attention import AgentAttention
from coterie.attention._agent_bias import reach_of, resized
from coterie.layers.layout import to_grid
from coterie.layers.padding import strided
from coterie.models._checks import check_pyramid
from coterie.models._pyramid import drop_path_rates
from coterie.models._registry import register_vision_model
from coterie.models.agent_hosts import (
    PATCH,
    AgentPyramid,
    HostBlock,
    HostStage,
    PatchConv,
    PatchStem,
    grids_of,
    init_weights,
    per_stage,
    pretrained_cfg,
)

__all__ = ["AgentPVT"]

EPS = 1e-6


@register_notrace_module  # looks at shapes and masks, which torch.fx cannot follow
class PositionedPatches(nn.Module):
    """2x2 patches (or the map as it is, where a stage begins at the stem's), and a learned table of positions.

    Args:
        in_dim, dim: channels in and out; `in_dim` None for no patches.
        size: rows and columns that the table is made for; at other sizes it is interpolated.

    Shape: (batch, in_dim, H, W) -> token grid (batch, ceil(H / stride), ceil(W / stride), dim).
    """

    def __init__(self, in_dim: int | None, dim: int, size: tuple[int, int], *, device=None, dtype=None) -> None:
        super().__init__()
        self.size = size
        self.patches = None if in_dim is None else PatchConv(in_dim, dim, 2, device=device, dtype=dtype)
        self.position = nn.Parameter(torch.empty(1, size[0] * size[1], dim, device=device, dtype=dtype))
        trunc_normal_(self.position, std=0.02)

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns dim"]:
        """Merge and add the positions; with a mask those that each sample would get alone."""
        x = to_grid(x) if self.patches is None else self.patches(x, mask)
        if mask is not None:
            mask = strided(mask, 1 if self.patches is None else 2)
        grid = (x.shape[1], x.shape[2])
        table = self.position.transpose(1, 2).unflatten(2, self.size)  # (1, dim, rows, columns)
        table = resized(table, grid, None if mask is None else reach_of(mask)).squeeze(1)
        return x + table.permute(0, 2, 3, 1)


class AgentPVT(AgentPyramid):
    """Pyramid Vision Transformer with agent attention, with timm's model interface.

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (timm's poolings).
        img_size: size of the images that biases and positions are made for, one number or (height, width). Images of
            any size are taken: biases and positions are interpolated.
        dims, depths, num_heads: channels, blocks and heads of each stage.
        agents: agents along each side, one number per stage. A map with fewer tokens repeats some.
        mlp_ratio: hidden over outer channels of the feed-forward, one number per stage.
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
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        agents: int | Sequence[int] = (3, 4, 7, 7),
        mlp_ratio: int | Sequence[int] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        check_pyramid(in_chans, num_classes, dims, depths, num_heads, PATCH, drop_rate, drop_path_rate)
        sides = per_stage("agents", agents, len(dims), least=1)
        ratios = per_stage("mlp_ratio", mlp_ratio, len(dims), least=1)
        self.in_chans, self.num_classes, self.stem_stride = in_chans, num_classes, PATCH
        self.stem = PatchStem(in_chans, dims[0], **dd)
        stages = []
        for index, (dim, heads, grid) in enumerate(zip(dims, num_heads, grids_of(img_size, len(dims)))):
            attention: dict[str, Any] = {"agents": sides[index], "repeat": True, "bias_size": grid, "dwc": True}
            blocks = [
                HostBlock(
                    AgentAttention(dim, heads, **attention, **dd),
                    mlp_ratio=ratios[index],
                    drop_path=rate,
                    eps=EPS,
                    **dd,
                )
                for rate in drop_path_rates(drop_path_rate, depths)[index]
            ]
            begin = PositionedPatches(dims[index - 1] if index else None, dim, grid, **dd)
            stages.append(HostStage(begin, blocks, stride=2 if index else 1))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": PATCH << index, "module": f"stages.{index}"} for index, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm: nn.Module = nn.Identity()
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        named_apply(init_weights, self)

    def joined(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' `q` and `kv` projections as the one `qkv` that they are here."""
        joined = {name: value for name, value in state.items() if ".attn.q." not in name}
        for name in [name for name in joined if ".attn.kv." in name]:
            query = state.get(name.replace(".kv.", ".q."))
            if query is not None:
                joined[name.replace(".kv.", ".qkv.")] = torch.cat([query, joined.pop(name)])
        return joined

    def own_name(self, name: str) -> str:
        """What a parameter of the authors is called here: theirs number the stages from 1, and name each list."""
        part, _, rest = name.partition(".")
        if part == "head":
            return f"head.fc.{rest}"
        kind, index = part[:-1], part[-1]
        if kind not in ("patch_embed", "pos_embed", "block") or not index.isdigit():
            return name
        stage = f"stages.{int(index) - 1}"
        if kind == "block":
            return f"{stage}.blocks.{rest}"
        if kind == "pos_embed":
            return f"{stage}.downsample.position"
        rest = rest.replace("proj.", "conv.")
        return f"stem.{rest}" if index == "1" else f"{stage}.downsample.patches.{rest}"


default_cfgs = generate_default_cfgs(
    {f"agent_pvt_{size}": pretrained_cfg() for size in ("tiny", "small", "medium", "large")}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    kwargs.pop("dynamic_img_size", None)  # every size works
    feature_cfg = {"out_indices": tuple(range(len(kwargs["depths"]))), "flatten_sequential": True}
    return build_model_with_cfg(AgentPVT, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_vision_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-PVT-T: 11,570,352 parameters, 2.0 GMACs at 224 x 224."""
    return _create("agent_pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_vision_model
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-PVT-S: 20,635,066 parameters, 4.0 GMACs at 224 x 224."""
    return _create("agent_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_vision_model
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-PVT-M: 35,921,746 parameters, 7.0 GMACs at 224 x 224.

    With img_size=256 as published for that size: 36,083,682 parameters, 9.2 GMACs there.
    """
    return _create("agent_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_vision_model
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-PVT-L: 48,738,180 parameters, 10.4 GMACs at 224 x 224."""
    return _create("agent_pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})
