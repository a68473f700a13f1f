"""Who attends to whom: the attention masks of a forward pass, kept as rules wherever that is possible.

Without a cache, or with one that only grows, a layer needs no more than "causal, within this window, not to padding",
and no mask of tokens x tokens is built. Static caches hold places that are not filled yet, packed documents must not
see each other, and callers may bring masks of their own: these are bool masks (batch, 1, queries, keys).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer
from transformers.utils.import_utils import is_tracing

from coterie.models.dcformer.configuration import DCFormerConfig


class LayerMask(NamedTuple):
    """The mask of a layer, in the words of `coterie.ops.composable_attention`.

    `allowed` is (batch, 1, 1 or queries, keys or more); of more keys the last ones are meant.
    """

    is_causal: bool
    window: int | None
    allowed: Bool[Tensor, "#batch 1 #queries keys"] | None

    def of(self, keys: int) -> Bool[Tensor, "#batch 1 #queries keys"] | None:
        """The bool part, for so many keys."""
        return None if self.allowed is None else self.allowed[..., -keys:]


def layer_masks(
    config: DCFormerConfig,
    embeds: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    past: Cache | None,
    position_ids: Tensor | None,
) -> dict[str, LayerMask]:
    """The mask of every type of layer.

    Args:
        config: of the model.
        embeds: (batch, queries, ...), for its sizes and device.
        attention_mask: (batch, seen + queries), nonzero where a token is not padding; or, ready for use,
            (batch, 1, queries, keys), bool or 0 where a query may attend; or a dict of such by layer type.
        past: the cache, as it is before this pass.
        position_ids: (batch, queries), where the caller gave them. Positions that start anew without a cache or an
            attention mask mark packed documents, as elsewhere in transformers.

    Raises:
        ValueError: a mask of another shape, or one that leaves nothing but padding.
    """
    types = dict.fromkeys(config.layer_types or ())
    if isinstance(attention_mask, dict):
        return {kind: LayerMask(False, None, _as_bool(attention_mask[kind])) for kind in types}
    if attention_mask is not None and attention_mask.ndim == 4:
        _check_4d(attention_mask, embeds)
        return {kind: LayerMask(False, None, _as_bool(attention_mask)) for kind in types}
    padding = _padding(attention_mask, embeds, past)
    static = _static_layers(config, past)
    if static:
        return {kind: LayerMask(False, None, _static_mask(config, kind, embeds, padding, past)) for kind in types}
    allowed = None if padding is None else padding[:, None, None]
    if padding is None and past is None and position_ids is not None:
        allowed = _same_document(position_ids)
    return {kind: LayerMask(True, config.window_of[kind], allowed) for kind in types}


def masks_for_generation(
    config: DCFormerConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> dict[str, Tensor] | Tensor | None:
    """What `generate` prepares before a compiled step: the masks of a static cache, by layer type."""
    if past_key_values is None or not _static_layers(config, past_key_values):
        return attention_mask
    masks = layer_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)
    return {kind: mask.allowed for kind, mask in masks.items() if mask.allowed is not None}


def _static_layers(config: DCFormerConfig, past: Cache | None) -> bool:
    return past is not None and any(isinstance(layer, StaticLayer) for layer in past.layers)


def _static_mask(
    config: DCFormerConfig, kind: str, embeds: Tensor, padding: Tensor | None, past: Cache | None
) -> Bool[Tensor, "batch 1 queries keys"]:
    """Positions of queries against positions of a static cache's places."""
    assert past is not None
    layer = (config.layer_types or []).index(kind)
    queries = embeds.shape[1]
    keys, first_key = past.get_mask_sizes(queries, layer)
    seen = past.get_seq_length(layer)
    query_at = torch.arange(queries, device=embeds.device) + (
        seen.to(embeds.device) if isinstance(seen, Tensor) else seen
    )
    key_at = torch.arange(keys, device=embeds.device) + first_key
    ahead = key_at - query_at.unsqueeze(1)
    allowed = ahead <= 0
    window = config.window_of[kind]
    if window is not None:
        allowed = allowed & (ahead > -window)
    allowed = allowed[None, None].expand(embeds.shape[0], -1, -1, -1)
    if padding is None:
        return allowed
    places = torch.nn.functional.pad(padding, (0, max(0, keys + first_key - padding.shape[1])))
    return allowed & places[:, None, None, first_key : first_key + keys]


def _padding(attention_mask: Tensor | None, embeds: Tensor, past: Cache | None) -> Bool[Tensor, "batch keys"] | None:
    """The 2-dimensional mask as bool, None where it hides nothing."""
    if attention_mask is None:
        return None
    batch, queries = embeds.shape[:2]
    seen = 0 if past is None else past.get_seq_length()
    static = past is not None and any(isinstance(layer, StaticLayer) for layer in past.layers)
    fits = attention_mask.ndim == 2 and attention_mask.shape[0] == batch
    if fits and not static:
        fits = attention_mask.shape[1] == int(seen) + queries
    if not fits:
        keys = "seen + tokens" if static else int(seen) + queries
        raise ValueError(
            f"attention_mask must have shape (batch, tokens seen and new) = ({batch}, {keys}), or 4 dimensions, "
            f"got {tuple(attention_mask.shape)}"
        )
    padding = attention_mask.to(device=embeds.device, dtype=torch.bool)
    if is_tracing(padding):
        return padding
    real = int(padding.sum())
    if real == 0:
        raise ValueError(
            f"attention_mask leaves no token: all {padding.numel()} of the {tuple(padding.shape)} are padding"
        )
    return None if real == padding.numel() else padding


def _same_document(position_ids: Tensor) -> Bool[Tensor, "batch 1 tokens tokens"] | None:
    """Pairs within one document, of positions that start anew with each; None if they never do."""
    document = (position_ids[:, 1:] - position_ids[:, :-1] != 1).cumsum(-1)
    if not is_tracing(document) and not bool(document[:, -1:].any()):
        return None
    document = torch.nn.functional.pad(document, (1, 0))
    return (document.unsqueeze(2) == document.unsqueeze(1)).unsqueeze(1)


def _as_bool(mask: Tensor) -> Bool[Tensor, "batch 1 queries keys"]:
    """A bool mask as it is; of a float one, which is added to scores, the places that are not (almost) -infinity."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0


def _check_4d(mask: Tensor, embeds: Tensor) -> None:
    batch, queries = embeds.shape[:2]
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2] not in (1, queries):
        raise ValueError(
            "an attention_mask of 4 dimensions must be (batch, 1, queries, keys), the same for all heads, with "
            f"batch={batch} and queries={queries}, got {tuple(mask.shape)}"
        )
