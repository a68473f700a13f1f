"""Swapping the attention of a timm model for a mechanism of this library, keeping its weights.

ViT and DeiT: a block of `timm.models.VisionTransformer` calls `attn(x, attn_mask=..., is_causal=...)` on a sequence
(batch, tokens, dim) that begins with class and register tokens. The mechanism takes the block's own `qkv`, `proj`,
query and key norms and scale, so names in the state_dict, optimizers and hooks keep working, and with `top_k` >= tokens
(or "global") the model's outputs are what they were.

DaViT and EfficientViT: "channel_group" takes the place of DaViT's (and Florence-2's) channel attention,
"shifted_window" that of its window attention, "cascaded_group" that of EfficientViT's. These are the same functions of
the same parameters under the same names: the model's outputs are what they were, in less time. Window attention here
takes a grid and timm's takes windows, so the block around it is exchanged too, with all its parts (`_timm_blocks.py`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from coterie.attention.base import GridAttention, attention_class, create_attention


@dataclass
class Replacement:
    """What `replace_attention` did: the modules swapped, by name, and why each other attention was not."""

    attention: str
    swapped: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} swapped for {self.attention!r}, {len(self.skipped)} left as they were"]
        lines += [f"  swapped  {name}" for name in self.swapped]
        lines += [f"  skipped  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def replace_attention(model: nn.Module, name: str, **options: Any) -> Replacement:
    """Swap the self-attention of every block of a timm VisionTransformer (ViT, DeiT, ...), DaViT or EfficientViT, in
    place.

    Class, distillation and register tokens become ordinary tokens of the sequence; for "dynamic_group",
    `global_tokens=model.num_prefix_tokens` keeps them seen by, and seeing, every token. New state (centroids) starts at
    random: `initialize_centroids(model, images)` fits it to data.

    In DaViT and EfficientViT a mechanism takes the place of its like only, and has the model's own options, among them
    `uneven="padded_input"`: where windows do not divide a map, zeros take part in attention, as in training.
    `uneven="masked"` leaves them out, which changes outputs at such sizes.

    Args:
        model: the model, changed in place.
        name: one of `list_attention()`.
        **options: of the mechanism, as `create_attention` takes them.

    Returns:
        What was swapped, and what was not and why; print it.

    Raises:
        ValueError: an unknown mechanism or option. TypeError: not a model.
    """
    from timm.layers import Attention  # timm is not needed before somebody brings a timm model

    from coterie.attention import _timm_blocks as blocks

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    mechanism = attention_class(name)
    create_attention(
        name, 8, 2, **{**options, "device": "meta"}
    )  # a wrong option is an error even with nothing to swap
    report = Replacement(name)
    swaps = blocks.swaps()
    done: list[str] = []
    plan: list[tuple[str, str, nn.Module]] = []
    for path, module in model.named_modules():
        if not _is_attention(path, module) or any(path.startswith(f"{outer}.") for outer in done):
            continue
        done.append(path)
        likes = [other for other, kinds in swaps.items() if type(module) in kinds]
        if likes == [name]:
            parent = path.rpartition(".")[0]
            block = model.get_submodule(parent) if parent else None
            reason = blocks.refusal(module, block)
            if reason is None:
                new, whole = blocks.converted(module, block, options)
                plan.append((path, parent if whole else path, new))
        elif likes:
            reason = f"{type(module).__name__} is the like of {likes[0]!r}, not of {name!r}"
        else:
            reason = _refusal(module, mechanism, name, Attention)
            if reason is None:
                plan.append((path, path, _converted(module, name, len(plan), options)))
        if reason is not None:
            report.skipped[path] = reason
    for path, place, new in plan:
        model.set_submodule(place, new)
        report.swapped.append(path)
    return report


def _is_attention(path: str, module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    named = "attention" in kind or "attn" in kind or path.rpartition(".")[2] in ("attn", "self_attn")
    return bool(path) and named and not isinstance(module, (nn.Identity, nn.Dropout, nn.Sequential, nn.ModuleList))


def _refusal(module: Any, mechanism: type[GridAttention], name: str, timm_attention: type[nn.Module]) -> str | None:
    """One sentence why a module cannot be swapped, or None."""
    kind = type(module).__name__
    if isinstance(module, GridAttention):
        return f"it is {kind} of this library already; build it with create_attention"
    if hasattr(module, "relative_position_bias_table") or hasattr(module, "rel_pos") or hasattr(module, "cpb_mlp"):
        return f"{kind} adds a relative position bias to its logits, which has no counterpart here"
    if type(module) is not timm_attention:
        return f"{kind} is not timm.layers.Attention, which timm's ViT and DeiT have; only that can be swapped"
    if 1 not in mechanism.grid_dims or "bidirectional self" not in mechanism.patterns:
        dims = " or ".join(map(str, sorted(mechanism.grid_dims)))
        return f"{name!r} works on {dims}-dimensional grids, and this block hands over a sequence"
    attention: Any = module
    qkv, proj = attention.qkv, attention.proj
    if qkv.in_features != attention.attn_dim or proj.out_features != qkv.in_features:
        widths = f"{qkv.in_features} channels in, {attention.attn_dim} in its heads, {proj.out_features} out"
        return f"it has {widths}, and these must be equal here"
    if getattr(attention, "gate", None) is not None:
        return "it gates its output, which has no counterpart here"
    if not isinstance(getattr(attention, "norm", None) or nn.Identity(), nn.Identity):
        return "it normalises its output before the projection, which has no counterpart here"
    if attention.attn_drop.p > 0:
        return f"it drops attention weights (attn_drop.p={attention.attn_drop.p}), not done here: set it to 0 first"
    return None


def _converted(module: Any, name: str, index: int, options: dict[str, Any]) -> GridAttention:
    """The mechanism with a timm attention's own projections, norms, scale and mode."""
    weight = module.qkv.weight
    new = create_attention(
        name,
        module.attn_dim,
        module.num_heads,
        block_index=index,
        **{"device": weight.device, "dtype": weight.dtype, **options},
    )
    new.qkv, new.proj, new.proj_drop = module.qkv, module.proj, module.proj_drop
    new.q_norm, new.k_norm, new.scale = module.q_norm, module.k_norm, module.scale
    new.register_forward_pre_hook(_as_timm_calls, with_kwargs=True)
    return new.train(module.training)


def _as_timm_calls(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """timm's `attn_mask` as `mask`, where it is one: bool over keys, (batch, 1, 1, tokens), alike for every query."""
    kwargs = dict(kwargs)
    attn_mask = kwargs.pop("attn_mask", None)
    if attn_mask is not None:
        x = args[0]
        padding = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool and attn_mask.ndim == 4
        if not padding or tuple(attn_mask.shape) != (x.shape[0], 1, 1, x.shape[1]):
            got = f"{attn_mask.dtype} {tuple(attn_mask.shape)}" if isinstance(attn_mask, Tensor) else repr(attn_mask)
            raise ValueError(
                f"attn_mask must be a bool mask over keys of shape (batch, 1, 1, tokens) = "
                f"{(x.shape[0], 1, 1, x.shape[1])} for {type(module).__name__}, got {got}"
            )
        kwargs["mask"] = attn_mask[:, 0, 0]
    return args, kwargs
