"""What a token says about how its heads compose: small maps over the heads, made from the token itself.

Dynamically Composable Multi-Head Attention, arXiv 2405.08553 (ICML 2024); the equations are those of the authors' code,
which normalises with eps 1e-6 over the heads. For N heads, rank R and a hidden width of 2·R·N per stream, a token x
gives in every stream

    hidden = GELU(W_hidden x)                  (2·R·N)      inner = w[:R] / rms(w[:R] over heads)
    w      = hidden · mix                      (2·R, N)     outer = w[R:]
    gate   = tanh(W_gate x)                    (N)

A stream is one of pre-softmax or post-softmax, times what the token gives as a query or as a key: in this order, pre
query, pre key, post query, post key. `HeadComposition` says what is done with inner (`*_in`), outer (`*_out`) and gate.
A decoder keeps 2·R + 1 numbers per head of each key stream (10 per head and token for rank 2): `key_part`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coterie.ops import HeadComposition

USES = ("pre", "post")
SIDES = ("query", "key")
INITIAL_MAPS = ("small", "zero")
_EPS = 1e-6


class HeadMaps(nn.Module):
    """Tokens to the `HeadComposition`s of their attention, before (pre) and after (post) the softmax.

    Args:
        dim: channels of a token.
        num_heads: query heads that compose.
        rank: rank of each map beside its diagonal; 2 in the paper.
        uses: which of "pre" and "post" there are.
        sides: which of "query" and "key" give maps; none at all leaves only the static map.
        static: whether each use has a learned map that is the same for all tokens, started at N(0, (0.1/√N)²).
        initial: "small" (the authors': nearly the identity) or "zero" (exactly the identity, and still trainable, for
            a model that had plain attention).
        approximate: the GELU of the hidden layer, "none" (erf, as the authors' PyTorch code) or "tanh" (as their JAX
            training code).
        device, dtype: of the parameters.
    """

    hidden: nn.Linear
    gate: nn.Linear
    mix: nn.Parameter
    static_pre: nn.Parameter | None
    static_post: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rank: int = 2,
        uses: tuple[str, ...] = USES,
        sides: tuple[str, ...] = SIDES,
        static: bool = False,
        initial: str = "small",
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank must be an int, got {rank!r} of type {type(rank).__name__}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        _check_subset("uses", uses, USES)
        _check_subset("sides", sides, SIDES)
        for name, value, choices in (
            ("initial", initial, INITIAL_MAPS),
            ("approximate", approximate, ("none", "tanh")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        self.dim, self.num_heads, self.rank, self.initial, self.approximate = dim, num_heads, rank, initial, approximate
        self.uses = tuple(use for use in USES if use in uses)
        self.sides = tuple(side for side in SIDES if side in sides)
        self.streams = tuple((use, side) for use in self.uses for side in self.sides)
        hidden_dim, streams = 2 * rank * num_heads, len(self.streams)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if streams:
            self.hidden = nn.Linear(dim, streams * hidden_dim, bias=False, **where)
            self.gate = nn.Linear(dim, streams * num_heads, bias=False, **where)
            self.mix = nn.Parameter(torch.empty(streams, hidden_dim, 2 * rank, num_heads, **where))
        for use in USES:
            static_map = torch.empty(num_heads, num_heads, **where) if static and use in self.uses else None
            self.register_parameter(f"static_{use}", None if static_map is None else nn.Parameter(static_map))
        self.reset_parameters()

    def initial_stds(self) -> list[tuple[Tensor, float]]:
        """Every parameter with the standard deviation that it is drawn with, of mean zero."""
        d, n, r = self.dim, self.num_heads, self.rank
        stds: list[tuple[Tensor, float]] = [
            (p, 0.1 / math.sqrt(n)) for p in (self.static_pre, self.static_post) if p is not None
        ]
        if self.streams:
            stds.append((self.hidden.weight, math.sqrt(2 / (d + 2 * r * n))))
            stds.append((self.gate.weight, 0.005 * math.sqrt(2 / (d + n))))
            stds.append((self.mix, 0.02 / (math.sqrt(2 * n * r) * (n + r))))
        return stds

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the parameters anew, as `initial` says."""
        for parameter, std in self.initial_stds():
            nn.init.normal_(parameter, std=std)
        if self.initial == "zero":
            self.set_identity()

    @torch.no_grad()
    def set_identity(self) -> None:
        """Make every map the identity: outer halves, gates and static maps zero. The inner halves keep what they are,
        as with both halves zero neither would ever get a gradient."""
        if self.streams:
            self.mix[:, :, self.rank :].zero_()
            self.gate.weight.zero_()
        for parameter in (self.static_pre, self.static_post):
            if parameter is not None:
                parameter.zero_()

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], context: Float[Tensor, "batch keys dim"] | None = None
    ) -> tuple[HeadComposition, HeadComposition]:
        """The maps before and after the softmax: queries are the tokens of `x`, keys those of `context`, or of `x`."""
        maps: dict[str, dict[str, Tensor]] = {"pre": {}, "post": {}}
        if self.streams:
            side_of_x = SIDES if context is None else ("query",)
            self._add_streams(maps, x, side_of_x)
            if context is not None:
                self._add_streams(maps, context, ("key",))
        pre = HeadComposition(static=self.static_pre, **maps["pre"])
        return pre, HeadComposition(static=self.static_post, **maps["post"])

    def _add_streams(self, maps: dict[str, dict[str, Tensor]], x: Tensor, sides: tuple[str, ...]) -> None:
        if not set(sides) & set(self.sides):
            return
        hidden = F.gelu(self.hidden(x), approximate=self.approximate).unflatten(-1, (len(self.streams), -1))
        mixed = torch.einsum("btsk,skin->btsin", hidden, self.mix.to(hidden.dtype))
        inner, outer = mixed.split(self.rank, dim=3)
        inner = _unit_rms(inner)
        gates = self.gate(x).tanh().unflatten(-1, (len(self.streams), -1))
        for (use, side), *parts in zip(self.streams, inner.unbind(2), outer.unbind(2), gates.unbind(2), strict=True):
            if side in sides:
                for name, part in zip(("in", "out", "gate"), parts, strict=True):
                    maps[use][f"{side}_{name}"] = part

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, rank={self.rank}, uses={self.uses}, sides={self.sides}"


def key_part(maps: HeadComposition) -> Float[Tensor, "batch keys numbers heads"] | None:
    """What the keys say, in one tensor for a cache: 2·rank + 1 numbers per key and head; None if they say nothing."""
    if maps.key_in is None or maps.key_out is None or maps.key_gate is None:
        return None
    return torch.cat([maps.key_in, maps.key_out, maps.key_gate.unsqueeze(2)], dim=2)


def with_key_part(maps: HeadComposition, part: Float[Tensor, "batch keys numbers heads"] | None) -> HeadComposition:
    """The same maps with other keys: those of a `key_part`."""
    if part is None:
        return maps
    rank = part.shape[2] // 2
    return maps._replace(key_in=part[:, :, :rank], key_out=part[:, :, rank : 2 * rank], key_gate=part[:, :, 2 * rank])


def _unit_rms(inner: Float[Tensor, "*tokens heads"]) -> Float[Tensor, "*tokens heads"]:
    """Divided by the root mean square over heads, in float32: at the start the mean square is about eps itself."""
    wide = inner if inner.dtype == torch.float64 else inner.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPS)).to(inner.dtype)


def _check_subset(name: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
    if isinstance(values, str) or not set(values) <= set(choices):
        raise ValueError(f"{name} must be a tuple out of {', '.join(map(repr, choices))}, got {values!r}")
