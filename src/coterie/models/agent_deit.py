"""Agent-DeiT: timm's VisionTransformer whose blocks, or whose first ones, have agent attention.

"Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874; authors' code
LeapLabTHU/Agent-Attention. It is timm's own class, with all that timm offers, and "agent" of `coterie.attention` with
biases and convolution. The class token asks the agents and they ask it; it is not averaged and has no neighbours.

Images of any size are taken: timm interpolates the positions (bicubic), agent attention its biases (linear).
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from jaxtyping import Float
from timm.layers import PatchEmbed, register_notrace_function, register_notrace_module, resample_abs_pos_embed
from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from coterie.attention import AgentAttention, replace_attention
from coterie.models._checks import check_count, check_images
from coterie.models._registry import register_vision_model
from coterie.models.agent_hosts import agent_layout, agent_name, fitted, pretrained_cfg

__all__ = ["AgentVisionTransformer"]

register_notrace_module(AgentAttention)  # one node each for torch.fx, which cannot follow shapes and masks
register_notrace_function(resample_abs_pos_embed)


@register_notrace_module
class PlacedPatchEmbed(PatchEmbed):
    """timm's, which says what is wrong with an image that it cannot take, and notes how the patches lie.

    A sequence of tokens does not tell its rows and columns. `grids` does, by number of tokens: each grid is noted when
    its patches are made, and read by the attention in the same forward pass (or, checkpointing, in its backward pass:
    do not run images of two shapes with equally many patches between a forward and its backward pass then).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grids: dict[int, tuple[int, ...]] = {}

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Tensor:
        x = check_images(x, self.proj.in_channels)
        grid = self.dynamic_feat_size((x.shape[2], x.shape[3]))
        self.grids[prod(grid)] = grid
        return super().forward(x)


class AgentVisionTransformer(VisionTransformer):
    """timm's VisionTransformer with agent attention.

    Args:
        *args, **kwargs: of timm's VisionTransformer. Images of any size are taken (`dynamic_img_size`) unless it is
            False. `img_size` is what positions and biases are made for.
        agents: agents along each side.
        agent_blocks: how many blocks, the first ones, have agent attention; None for all. The others keep timm's.

    Raises:
        ValueError: something that agent attention does not do: dropped attention weights, register tokens in biases.
    """

    def __init__(
        self, *args: Any, agents: int | Sequence[int] = 7, agent_blocks: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(
            *args, **{"dynamic_img_size": True, "dynamic_img_pad": True, "embed_layer": PlacedPatchEmbed, **kwargs}
        )
        if agent_blocks is not None:
            check_count("agent_blocks", agent_blocks, least=0)
        embed: Any = self.patch_embed
        first: nn.Module = self.blocks if agent_blocks is None else self.blocks[:agent_blocks]
        report = replace_attention(
            first,
            "agent",
            agents=(agents, agents) if isinstance(agents, int) else agents,
            repeat=True,
            bias_size=embed.grid_size,
            dwc=True,
            prefix_tokens=self.num_prefix_tokens,
        )
        for name, reason in report.skipped.items():
            raise ValueError(f"block {name} cannot have agent attention: {reason}")
        for name in report.swapped:
            first.get_submodule(name).grids = embed.grids

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should spare, beyond those of one dimension."""
        return {name for name in super().no_weight_decay() if getattr(self, name, None) is not None}

    def from_authors(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The authors' weights under the names here, for `coterie.models.load_authors_checkpoint`.

        Biases and positions of another image size are resized as the authors' loader does it.
        """
        own = {agent_name(name): agent_layout(name, value) for name, value in state.items()}
        return fitted(own, self.state_dict()), {}


default_cfgs = generate_default_cfgs(
    {
        f"agent_deit_{size}": pretrained_cfg(pool_size=None, first_conv="patch_embed.proj", classifier="head")
        for size in ("tiny", "small", "base")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        AgentVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )


@register_vision_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-DeiT-T: 6,015,640 parameters, 1.2 GMACs at 224 x 224; 49 agents in every block."""
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("agent_deit_tiny", pretrained, **{**sizes, **kwargs})


@register_vision_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-DeiT-S: 22,647,112 parameters, 4.4 GMACs at 224 x 224; 49 agents in every block.

    With img_size=448 as published for that size: 23,070,472 parameters, 17.7 GMACs there.
    """
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("agent_deit_small", pretrained, **{**sizes, **kwargs})


@register_vision_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Agent-DeiT-B: 87,204,904 parameters, 17.6 GMACs at 224 x 224; 81 agents in the first 4 of its 12 blocks."""
    sizes = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "agents": 9, "agent_blocks": 4}
    return _create("agent_deit_base", pretrained, **{**sizes, **kwargs})
