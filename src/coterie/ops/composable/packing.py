"""Maps as the kernels read them: each side's parts in one tensor of float32 (float64 for float64), and back."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from coterie.ops.composable.maps import HeadComposition


def even_rank(into: Float[Tensor, "batch tokens rank heads"] | None) -> int:
    """The rank as packed: kernels take ranks two at a time."""
    return 0 if into is None else into.shape[2] + into.shape[2] % 2


def pack(
    maps: HeadComposition, wide: torch.dtype
) -> tuple[
    Float[Tensor, "batch queries rows heads"] | None,
    Float[Tensor, "batch keys key_rows heads"] | None,
    Float[Tensor, "heads heads"] | None,
]:
    """The query's, the key's and the static part; rows are `in`, `out` (even_rank each) and the gate.

    The query's gate holds the identity too: it is one more than what was given. A side without any part is None.
    """
    static = None if maps.static is None else maps.static.to(wide).contiguous()
    query = _side(maps.query_in, maps.query_out, maps.query_gate, 1.0, wide)
    return query, _side(maps.key_in, maps.key_out, maps.key_gate, 0.0, wide), static


def _side(into: Tensor | None, out: Tensor | None, gate: Tensor | None, one: float, wide: torch.dtype) -> Tensor | None:
    ranks = [pad(x.to(wide), (0, 0, 0, x.shape[2] % 2)) for x in (into, out) if x is not None]
    if gate is not None:
        gate = gate.to(wide) + one
    elif ranks:
        gate = ranks[0].new_full((*ranks[0].shape[:2], ranks[0].shape[3]), one)
    else:
        return None
    return torch.cat([*ranks, gate.unsqueeze(2)], 2)


def unpack(
    maps: HeadComposition,
    query: Float[Tensor, "batch queries rows heads"] | None,
    key: Float[Tensor, "batch keys key_rows heads"] | None,
    static: Float[Tensor, "heads heads"] | None,
) -> list[Tensor | None]:
    """The gradients of the seven parts of `maps`, each in its dtype and its own memory, from those of `pack`."""
    parts = [*_split(query, maps.query_in), *_split(key, maps.key_in), static]
    return [
        None if x is None or like is None else like.new_empty(like.shape).copy_(x)
        for x, like in zip(parts, maps, strict=True)
    ]


def _split(side: Tensor | None, into: Tensor | None) -> list[Tensor | None]:
    if side is None:
        return [None, None, None]
    if into is None:
        return [None, None, side[:, :, -1]]
    rank, even = into.shape[2], even_rank(into)
    return [side[:, :, :rank], side[:, :, even : even + rank], side[:, :, -1]]
