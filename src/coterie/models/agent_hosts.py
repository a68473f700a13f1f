"""What the pyramids of the Agent Attention paper have in common: stems of patches, blocks, tables tied to a size.

    block       x = x + Attention(LN(x));  x = x + MLP(LN(x))

Their learned biases and position tables are made for one image size. Other sizes work: the tables are interpolated
while the model runs. And the weights of one size load into a model that is built for another: `fitted` resizes the
tables as the authors' loader does.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import DropPath, Mlp, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from coterie.attention import AgentAttention, GridAttention
from coterie.layers.by_rows import by_rows
from coterie.layers.layout import to_grid
from coterie.layers.padding import zero_padding
from coterie.models._checks import check_count
from coterie.models._pyramid import Pyramid, PyramidStage
from coterie.models._registry import image_cfg

PATCH = 4
register_notrace_module(AgentAttention)  # torch.fx takes attention as one node: it looks at shapes and masks


@register_notrace_module  # looks at shapes and masks, which torch.fx cannot follow
class PatchConv(nn.Module):
    """Patches as tokens: a convolution as wide as its stride, then LN; maps are filled up with zeros to whole patches.

    Shape: (batch, in_dim, H, W) -> token grid (batch, ceil(H / side), ceil(W / side), dim).
    """

    def __init__(self, in_dim: int, dim: int, side: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, side, side, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_dim height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch rows columns dim"]:
        """Embed the patches; padding, where `mask` is False, is taken for zeros."""
        side = self.conv.stride[0]
        x = zero_padding(x.contiguous(memory_format=torch.channels_last), mask)
        down, across = -x.shape[2] % side, -x.shape[3] % side
        if down or across:
            x = F.pad(x, (0, across, 0, down)).contiguous(memory_format=torch.channels_last)
        return self.norm(to_grid(self.conv(x)))


class PatchStem(PatchConv):
    """4x4 patches of the image.

    Shape: (batch, in_chans, H, W) -> (batch, dim, ceil(H / 4), ceil(W / 4)), channels-last.
    """

    def __init__(self, in_chans: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__(in_chans, dim, PATCH, device=device, dtype=dtype)

    def forward(
        self, x: Float[Tensor, "batch in_chans height width"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch dim rows columns"]:
        """As `PatchConv`, seen as a map."""
        return super().forward(x, mask).permute(0, 3, 1, 2)


class HostBlock(nn.Module):
    """Attention and feed-forward, each after a LayerNorm and with its residual.

    Args:
        attn: the attention, called as `attn(grid, mask=mask)`.
        mlp_ratio: hidden over outer channels of the feed-forward.
        drop_path: share of samples for which a branch is left out in training.
        eps: of the LayerNorms.

    Shape: token grid (batch, height, width, dim) -> the same.
    """

    def __init__(
        self, attn: GridAttention, *, mlp_ratio: float, drop_path: float, eps: float, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(attn.dim, eps=eps, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(attn.dim, eps=eps, **dd)
        self.mlp = Mlp(attn.dim, int(attn.dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch height width dim"], mask: Bool[Tensor, "batch height width"] | None = None
    ) -> Float[Tensor, "batch height width dim"]:
        """Apply the block. With a mask (True = a real token) padding changes nothing at the other tokens."""
        x = x + self.drop_path(self.attn(self.norm1(x), mask=mask))
        return by_rows(self, self._fed_forward, x)

    def _fed_forward(self, x: Float[Tensor, "*grid dim"]) -> Float[Tensor, "*grid dim"]:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HostStage(PyramidStage):
    """What makes the map coarser, then blocks.

    Shape: feature map (batch, in_dim, H, W) -> (batch, dim, ceil(H / stride), ceil(W / stride)), channels-last.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], stride: int) -> None:
        super().__init__(stride)
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)


class AgentPyramid(Pyramid):
    """What the hosts share beside their blocks: features, classifier and the authors' weights.

    A subclass says in `own_name` what a parameter of the authors is called here.
    """

    def from_authors(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The authors' weights under the names here, for `coterie.models.load_authors_checkpoint`.

        Biases and position tables of another image size are resized as the authors' loader does it.
        """
        own: dict[str, Tensor] = {}
        dropped: dict[str, str] = {}
        for name, value in self.joined(state).items():
            if name.endswith(("relative_position_index", "attn_mask")):
                dropped[name] = "computed here from the sizes"
            else:
                renamed = agent_name(self.own_name(name))
                own[renamed] = agent_layout(name, value)
        return fitted(own, self.state_dict()), dropped

    def joined(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The authors' state, with what is one parameter here as one."""
        return dict(state)

    def own_name(self, name: str) -> str:
        """What a parameter outside of agent attention is called here."""
        raise NotImplementedError(f"{type(self).__name__} must define own_name")


# What the authors call the parts of the two biases: agents over tokens (aggregation), tokens over agents (broadcast).
_BIASES = {
    "an_bias": "key_bias.table",
    "ah_bias": "key_bias.lines.0",
    "aw_bias": "key_bias.lines.1",
    "ac_bias": "key_bias.prefix",
    "na_bias": "query_bias.table",
    "ha_bias": "query_bias.lines.0",
    "wa_bias": "query_bias.lines.1",
    "ca_bias": "query_bias.prefix",
}


def agent_name(name: str) -> str:
    """An authors' name, with its last part as AgentAttention has it."""
    head, _, last = name.rpartition(".")
    return f"{head}.{_BIASES[last]}" if last in _BIASES else name


def agent_layout(name: str, value: Tensor) -> Tensor:
    """An authors' bias as (heads, agents, places), whatever its axes; other tensors as they are."""
    last = name.rpartition(".")[2]
    if last in ("ah_bias", "aw_bias", "ac_bias"):
        return value.squeeze(0).flatten(2)
    if last in ("ha_bias", "wa_bias", "ca_bias"):
        return value.squeeze(0).flatten(1, -2).transpose(1, 2)
    return value


def fitted(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tables tied to a size, resized to the wanted shapes as the authors' loader does: lines of biases linearly, tables
    of relative positions and position embeddings bicubically. Whatever else does not fit is left as it is."""
    return {name: _fitted(name, value, wanted[name]) if name in wanted else value for name, value in state.items()}


def _fitted(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    if value.shape == wanted.shape or value.ndim != wanted.ndim:
        return value
    if "_bias.lines." in name and value.shape[:2] == wanted.shape[:2]:
        return F.interpolate(value, size=wanted.shape[2], mode="linear")
    if name.endswith("relative_position_bias_table") and value.shape[1] == wanted.shape[1]:
        return _bicubic(value.T[None], isqrt(len(wanted)))[0].T
    if name.endswith(("position", "pos_embed")) and value.shape[::2] == wanted.shape[::2]:
        before, after = isqrt(value.shape[1]), isqrt(wanted.shape[1])
        first = value.shape[1] - before**2  # a class token has no place
        table = _bicubic(value[:, first:].transpose(1, 2), after).transpose(1, 2)
        return torch.cat([value[:, :first], table], 1)
    return value


def _bicubic(table: Float[Tensor, "one channels places"], side: int) -> Float[Tensor, "one channels new_places"]:
    old = isqrt(table.shape[2])
    return F.interpolate(table.unflatten(2, (old, -1)), size=(side, side), mode="bicubic").flatten(2)


def grids_of(img_size: int | Sequence[int], stages: int) -> list[tuple[int, int]]:
    """Rows and columns of each stage's map for an image of that size.

    Raises:
        ValueError, TypeError: no size of an image.
    """
    sides = [img_size] * 2 if isinstance(img_size, int) else list(img_size)
    if len(sides) != 2:
        raise ValueError(f"img_size must be one number or (height, width), got {img_size!r}")
    for side in sides:
        check_count("img_size", side, least=1)
    height, width = sides
    return [(-(-height // (PATCH << i)), -(-width // (PATCH << i))) for i in range(stages)]


def per_stage(name: str, values: int | Sequence[int], stages: int, least: int) -> list[int]:
    """One whole number for each stage, from one for all or a list.

    Raises:
        ValueError, TypeError: a wrong number of them, or a wrong one.
    """
    listed = [values] * stages if isinstance(values, int) else list(values)
    if len(listed) != stages:
        raise ValueError(f"{name} must have one number for each of {stages} stages, got {len(listed)}: {values!r}")
    for value in listed:
        check_count(f"each of {name}", value, least=least)
    return listed


def init_weights(module: nn.Module, name: str = "") -> None:
    """As the authors: linear layers from a narrow normal, biases 0; convolutions and norms as torch has them."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def pretrained_cfg(**kwargs: Any) -> dict[str, Any]:
    """timm's description of one of these models."""
    usual = {
        "first_conv": "stem.conv",
        "paper_ids": "arXiv:2312.08874",
        "paper_name": "Agent Attention: On the Integration of Softmax and Linear Attention",
    }
    return image_cfg(**{**usual, **kwargs})
