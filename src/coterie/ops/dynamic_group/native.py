"""Dynamic group attention in torch operators only: runs on every device, compiles without a break, exports,
differentiates itself.

Group sizes vary widely, so queries are not padded to the largest group. They are sorted by group and cut into tiles
of a fixed number of
queries, each tile within one group; there are at most ceil(queries / tile) + groups tiles, whatever the sizes. Then
attention is two
batched matrix products of (tile x head_dim) with the group's keys. Memory is linear in the tokens.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from coterie.ops._state import exporting


def dynamic_groups(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    closeness: Float[Tensor, "heads groups head_dim"],
    bias: Float[Tensor, "heads groups"],
    direction: Float[Tensor, "heads groups head_dim"],
    top_k: int,
    key_mask: Bool[Tensor, "batch keys"] | None,
    normalize_keys: bool,
) -> tuple[Int[Tensor, "batch heads queries"], Int[Tensor, "batch heads groups selected"]]:
    """argmax over groups of <q, closeness> + bias, and the top-k keys by <k, direction>, in float32; ties to the
    lower index."""
    query, key = query.detach().float(), key.detach().float()
    with torch.no_grad():
        assignment = (query @ closeness.transpose(-1, -2) + bias.unsqueeze(1)).argmax(-1)
        if normalize_keys:
            key = key / key.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        relevance = direction @ key.transpose(-1, -2)
    if key_mask is not None:
        relevance = relevance.masked_fill(~key_mask[:, None, None], float("-inf"))
    if exporting():  # ONNX gives ties to the lower index by definition, and has no bit casts
        return assignment, relevance.topk(top_k, dim=-1).indices.sort(dim=-1).values
    return assignment, _ordered_keys(relevance).topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values


def _ordered_keys(scores: Tensor) -> Tensor:
    """int64 numbers in the order of `scores`, with ties broken towards the lower index, so that any top-k gives the
    same answer."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: -0 and 0 are a tie
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    position = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return ordered * 2**32 + position


def grouped_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    assignment: Int[Tensor, "batch heads queries"],
    selected: Int[Tensor, "batch heads groups selected"],
    key_mask: Bool[Tensor, "batch keys"] | None,
    scale: float,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """softmax(scale q k^T) v of every query over the keys of its group."""
    batch, heads, queries, groups = *query.shape[:3], selected.shape[2]
    size = _tile_size(queries, groups)
    tiles = -(-queries // size) + groups

    order = assignment.sort(dim=-1).indices
    members = torch.zeros(batch, heads, groups, dtype=torch.int64, device=query.device)
    members = members.scatter_add(-1, assignment, torch.ones_like(assignment))
    tiles_of_group = (members + size - 1) // size
    first_member, first_tile = members.cumsum(-1) - members, tiles_of_group.cumsum(-1) - tiles_of_group
    # place: where each query, in its given order, stands among the padded tiles
    sorted_group = assignment.gather(-1, order)
    rank = torch.arange(queries, device=query.device) - first_member.gather(-1, sorted_group)
    sorted_place = first_tile.gather(-1, sorted_group) * size + rank
    place = torch.empty_like(sorted_place).scatter(-1, order, sorted_place)
    # group of each tile; tiles beyond the last are empty and may be of any group
    ends = tiles_of_group.cumsum(-1)
    tile_group = (torch.arange(tiles, device=query.device)[:, None] >= ends[:, :, None]).sum(-1).clamp_max(groups - 1)

    tiled = query.new_zeros(batch, heads, tiles * size, query.shape[3])
    tiled = tiled.scatter(2, place.unsqueeze(-1).expand(query.shape), query * scale)
    tiled = tiled.view(batch, heads, tiles, size, -1)
    chosen = selected.gather(2, tile_group.unsqueeze(-1).expand(-1, -1, -1, selected.shape[3]))
    key, value = _rows(key, chosen), _rows(value, chosen)

    scores = tiled @ key.transpose(-1, -2)
    if key_mask is None:
        weights = scores.softmax(-1)
    else:
        allowed = (
            key_mask[:, None].expand(batch, heads, -1).gather(2, chosen.flatten(2)).view(chosen.shape).unsqueeze(3)
        )
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~allowed, 0.0)
    output = (weights @ value).flatten(2, 3)
    return output.gather(2, place.unsqueeze(-1).expand(-1, -1, -1, value.shape[-1]))


def _tile_size(queries: int, groups: int) -> int:
    """Half a mean group, as a power of two within 8 and 128: little padding, and products large enough to be fast."""
    mean = queries / groups
    for size in (8, 16, 32, 64):
        if mean < 4 * size:
            return size
    return 128


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (batch, heads, keys, dim) at index (batch, heads, tiles, selected) -> (batch, heads, tiles, selected, dim)."""
    flat = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(*index.shape, x.shape[-1])
