"""What stands in timm's DaViT and EfficientViT around our attention: their blocks, with the same parts under the same
names.

timm's blocks cut windows themselves and hand them to their attention one by one; ours takes the grid. Maps stay in
channels-last memory, so that nothing is copied between a map and its tokens.
"""

from typing import Any, cast

from jaxtyping import Float
from timm.layers import register_notrace_module
from torch import Tensor, nn

from coterie.attention.base import GridAttention
from coterie.attention.cascaded_group import CascadedGroupAttention
from coterie.attention.channel_group import ChannelGroupAttention
from coterie.attention.shifted_window import ShiftedWindowAttention
from coterie.layers.depthwise import residual_depthwise
from coterie.layers.layout import to_grid, to_map


@register_notrace_module  # attention looks at shapes, which torch.fx cannot follow
class DualBlock(nn.Module):
    """A spatial or a channel block of timm's DaViT, with our attention: the parts of `block`, and `attn`.

    The sum of a map and its depth-wise convolution is one convolution where no activation is between them.
    """

    def __init__(self, block: Any, attn: GridAttention) -> None:
        super().__init__()
        self.cpe1, self.norm1, self.attn, self.drop_path1 = block.cpe1, block.norm1, attn, block.drop_path1
        self.cpe2, self.norm2, self.mlp, self.drop_path2 = block.cpe2, block.norm2, block.mlp, block.drop_path2
        self.train(block.training)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        x = to_grid(_with_position(self.cpe1, x))
        x = self.drop_path1(self.attn(self.norm1(x))) + x
        x = to_grid(_with_position(self.cpe2, to_map(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return to_map(x)


@register_notrace_module
class LocalWindows(nn.Module):
    """timm's window wrapper of EfficientViT around our attention, which cuts the windows itself."""

    def __init__(self, wrapper: Any, attn: CascadedGroupAttention) -> None:
        super().__init__()
        self.attn = attn
        self.window_resolution, self.resolution = wrapper.window_resolution, wrapper.resolution
        self.train(wrapper.training)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return to_map(self.attn(to_grid(x)))

    def set_input_size(self, resolution: int) -> None:
        """What timm's `model.set_input_size` calls: windows are no larger than the map, biases are interpolated."""
        self.resolution = resolution
        self.attn.resize_window(min(self.window_resolution, resolution))


def _with_position(
    encoding: Any, x: Float[Tensor, "batch dim height width"]
) -> Float[Tensor, "batch dim height width"]:
    conv = encoding.proj
    if type(conv) is nn.Conv2d and isinstance(encoding.act, nn.Identity):
        return residual_depthwise(x, conv.weight, conv.bias)
    return encoding(x)


def swaps() -> dict[str, tuple[type[nn.Module], ...]]:
    """Which of timm's attention modules each mechanism takes the place of, beside that of its ViT."""
    from timm.models import davit, efficientvit_msra

    channel = (davit.ChannelAttention, getattr(davit, "ChannelAttentionV2", davit.ChannelAttention))
    return {
        "shifted_window": (davit.WindowAttention,),
        "channel_group": channel,
        "cascaded_group": (efficientvit_msra.LocalWindowAttention,),
    }


def refusal(module: Any, block: nn.Module | None) -> str | None:
    """One sentence why a module that `swaps` names cannot be swapped, or None; `block` is what holds it."""
    kind = type(module).__name__
    if kind == "LocalWindowAttention":
        inner = module.attn
        dim = inner.attention_biases.shape[0] * inner.val_dim
        if _out_channels(inner.proj[1]) != dim:
            return f"its heads have {inner.val_dim} channels, and the cascade needs those of a part of the input"
        return None
    if block is None or not all(hasattr(block, part) for part in ("cpe1", "norm1", "cpe2", "mlp", "drop_path1")):
        return f"{kind} is not inside a block of timm's DaViT, which has to be exchanged with it"
    return None


def converted(module: Any, block: Any, options: dict[str, Any]) -> tuple[nn.Module, bool]:
    """The module that takes the place, and whether it is the place of the block (or that of the attention)."""
    kind = type(module).__name__
    if kind == "LocalWindowAttention":
        return LocalWindows(module, _cascaded(module.attn, options)), False
    weight = module.qkv.weight
    own: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    heads = module.groups if kind == "ChannelAttentionV2" else module.num_heads
    dim = module.qkv.in_features
    attn: GridAttention
    if kind == "WindowAttention":
        own |= {"window_size": tuple(block.window_size), "shift_size": 0, "uneven": "padded_input"}
        attn = ShiftedWindowAttention(dim, heads, **{**own, **options})
    else:
        if kind == "ChannelAttentionV2":
            own |= {"order": "qkv", "scale": "tokens" if module.dynamic_scale else "head"}
        attn = ChannelGroupAttention(dim, heads, **{**own, **options})
    attn.qkv, attn.proj = module.qkv, module.proj
    return DualBlock(block, attn.train(module.training)), True


def _cascaded(module: Any, options: dict[str, Any]) -> CascadedGroupAttention:
    fixed = sorted({"key_dim", "kernels", "window_size"} & set(options))
    if fixed:
        raise ValueError(f"{fixed[0]} belongs to the weights of the model, which are kept: leave it out")
    table = module.attention_biases
    kernels = [_conv(part).kernel_size[0] for part in module.dws]
    new = CascadedGroupAttention(
        module.num_heads * module.val_dim,
        module.num_heads,
        **{
            "key_dim": module.key_dim,
            "kernels": kernels,
            "window_size": module.resolution,
            "uneven": "padded_input",
            "device": table.device,
            "dtype": table.dtype,
            **options,
        },
    )
    new.qkvs, new.dws, new.proj, new.attention_biases = module.qkvs, module.dws, module.proj, table
    return new.train(module.training)


def _conv(part: nn.Module) -> nn.Conv2d:
    return part if isinstance(part, nn.Conv2d) else cast(Any, part).conv


def _out_channels(part: nn.Module) -> int:
    return _conv(part).out_channels
