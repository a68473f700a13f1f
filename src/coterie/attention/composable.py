"""Composable multi-head attention: the heads' scores, and their weights, are mixed by maps that the tokens give.

Dynamically Composable Multi-Head Attention, arXiv 2405.08553 (ICML 2024). Between any query t and key s the N scores
of the heads, and after the softmax their N weights, are multiplied by an N x N matrix: the identity, plus what token t
says as a query, plus what token s says as a key, each of low rank plus a diagonal (`coterie.attention.head_maps`).

    x (batch, *grid, dim) -> query, key, value (batch, heads, tokens, head_dim), maps of every token
      -> scores, composed, masked, softmax, composed again, times values -> output (batch, *grid, dim)

With all maps zero this is multi-head attention. The authors leave cross-attention unwired and grouped key and value
heads unsupported; here query maps come from `x` and key maps from `context`, and the heads that compose are the query
heads: a key gives one number per query head, whatever the number of key and value heads.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.attention.base import PATTERNS, GridAttention, check_int, register_attention, unit_rows
from coterie.attention.head_maps import SIDES, USES, HeadMaps, key_part, with_key_part
from coterie.attention.rms_norm import RMSNorm
from coterie.attention.rotary import rotary_frequencies, rotary_tables, rotate
from coterie.ops import HeadComposition, composable_attention


class KeyCache:
    """What decoding keeps of the tokens seen so far: keys, values, padding, and the keys' maps.

    The maps are their factors, 2·rank + 1 numbers per head, token and use (10 with rank 2), and not N x N matrices.
    Layers with a window keep their last window - 1 tokens. One cache belongs to one layer.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.mask: Tensor | None = None
        self.maps: tuple[Tensor | None, Tensor | None] = (None, None)

    def append(
        self,
        key: Float[Tensor, "batch kv_heads new head_dim"],
        value: Float[Tensor, "batch kv_heads new head_dim"],
        maps: tuple[Tensor | None, Tensor | None],
        mask: Bool[Tensor, "batch new"] | None,
        window: int | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None], Tensor | None]:
        """Take new tokens in; return keys, values, maps (batch, keys, 2·rank + 1, heads) and mask of all kept ones."""
        self.seen += key.shape[2]
        if self.key is not None and self.value is not None:
            if key.shape[0] != self.key.shape[0]:
                raise ValueError(f"x must have the batch size of the cache, {self.key.shape[0]}, got {key.shape[0]}")
            if mask is not None or self.mask is not None:
                rows, past, new = key.shape[0], self.key.shape[2], key.shape[2]
                old = key.new_ones(rows, past, dtype=torch.bool) if self.mask is None else self.mask
                mask = torch.cat([old, key.new_ones(rows, new, dtype=torch.bool) if mask is None else mask], dim=1)
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
            both = zip(self.maps, maps, strict=True)
            joined = [new if old is None or new is None else torch.cat([old, new], dim=1) for old, new in both]
            maps = (joined[0], joined[1])
        keep = key.shape[2] if window is None else min(window - 1, key.shape[2])
        first = key.shape[2] - keep
        self.key, self.value = key[:, :, first:], value[:, :, first:]
        self.mask = None if mask is None else mask[:, first:]
        self.maps = (
            None if maps[0] is None else maps[0][:, first:],
            None if maps[1] is None else maps[1][:, first:],
        )
        return key, value, maps, mask


@register_attention("composable")
class ComposableMultiHeadAttention(GridAttention):
    """Multi-head attention whose heads compose; with zero maps, plain multi-head attention.

    Args:
        dim, num_heads, and the keywords of GridAttention.
        kv_heads: key and value heads, a divisor of `num_heads` (grouped-query attention); as many as query heads if
            None. Only then do `qkv` and its shapes agree with the other mechanisms.
        window: on a sequence, attend to the nearest `window` tokens, oneself counted (the authors' local layers: 256).
        rotary: base of rotary positions along a sequence (10000 is usual); no positions if None.
        rotary_fraction: share of a head's channels that rotate.
        qk_norm: RMS-normalise queries and keys per head, with a learned scale, before they rotate.
        rank: of each token's map beside its diagonal.
        uses: out of "pre" (scores are composed) and "post" (weights are composed).
        sides: out of "query" and "key": whose maps there are; ("query",) is the authors' query-wise variant.
        static: whether there is a learned map beside those of the tokens.
        initial: "small" (the authors': nearly the identity) or "zero" (the identity, and trainable).
        backend: of `coterie.ops.composable_attention`.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset(PATTERNS)
    operation: ClassVar[str] = "composable_attention"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        window: int | None = None,
        rotary: float | None = None,
        rotary_fraction: float = 1.0,
        qk_norm: bool = False,
        rank: int = 2,
        uses: tuple[str, ...] = USES,
        sides: tuple[str, ...] = SIDES,
        static: bool = False,
        initial: str = "small",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if kv_heads is None:
            kv_heads = num_heads
        check_int("kv_heads", kv_heads)
        if num_heads % kv_heads:
            raise ValueError(f"kv_heads must divide num_heads, got kv_heads={kv_heads} and num_heads={num_heads}")
        if window is not None:
            check_int("window", window)
        if not 0 < rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must be above 0 and at most 1, got {rotary_fraction}")
        if rotary is not None and rotary <= 0:
            raise ValueError(f"rotary must be a base above 0, or None, got {rotary}")
        self.rotary_dim = int(self.head_dim * rotary_fraction)
        if rotary is not None and (self.rotary_dim % 2 or not self.rotary_dim):
            raise ValueError(
                f"the channels that rotate must be even and at least 2, got {self.rotary_dim} "
                f"of head_dim={self.head_dim} with rotary_fraction={rotary_fraction}"
            )
        self.kv_heads, self.window, self.rotary, self.backend = kv_heads, window, rotary, backend
        if kv_heads != num_heads:
            width = (num_heads + 2 * kv_heads) * self.head_dim
            self.qkv = nn.Linear(dim, width, bias=self.qkv.bias is not None, **where)
        if qk_norm:
            self.add_module("q_norm", RMSNorm(self.head_dim, eps=1e-6, **where))
            self.add_module("k_norm", RMSNorm(self.head_dim, eps=1e-6, **where))
        self.maps = HeadMaps(dim, num_heads, rank=rank, uses=uses, sides=sides, static=static, initial=initial, **where)

    def forward(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Float[Tensor, "batch *key_grid dim"] | None = None,
        *,
        mask: Bool[Tensor, " batch *key_grid"] | None = None,
        is_causal: bool = False,
        cache: KeyCache | None = None,
    ) -> Float[Tensor, "batch *grid dim"]:
        """Attend from the tokens of `x` to those of `context`, or of `x` and whatever `cache` holds.

        With a cache, attention is causal self-attention; `x` and `mask` are the next tokens and their padding, any
        number at a time, and the outputs are those of one call with all tokens.

        Raises:
            ValueError: for a grid, pattern, shape, device or dtype that this mechanism does not take, naming what it
                does.
            TypeError: for an argument of another type.
        """
        self.check(x, context, mask=mask, is_causal=is_causal)
        self._check_sequence(x, context, is_causal, cache)
        tokens = x.flatten(1, -2)
        query, key, value = self.project(x, context)
        pre, post = self.maps(tokens, None if context is None else context.flatten(1, -2))
        key_mask = None if mask is None else mask.flatten(1)
        if self.rotary is not None:
            query, key = self._rotated(query, key, 0 if cache is None else cache.seen)
        if cache is not None:
            parts = (key_part(pre), key_part(post))
            key, value, parts, key_mask = cache.append(key, value, parts, key_mask, self.window)
            pre, post = with_key_part(pre, parts[0]), with_key_part(post, parts[1])
        y = self._attend(query, key, value, pre, post, key_mask, is_causal)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))

    def project(
        self, x: Float[Tensor, "batch *grid dim"], context: Float[Tensor, "batch *key_grid dim"] | None = None
    ) -> tuple[
        Float[Tensor, "batch heads queries head_dim"],
        Float[Tensor, "batch kv_heads keys head_dim"],
        Float[Tensor, "batch kv_heads keys head_dim"],
    ]:
        """Queries, keys and values per head, normalised where the model asks for it, neither scaled nor rotated."""
        if self.kv_heads == self.num_heads:
            return super().project(x, context)
        kv = self.kv_heads * self.head_dim
        if context is None:
            parts = self.qkv(x.flatten(1, -2)).split([self.dim, kv, kv], dim=-1)
        else:
            weight_q, weight_kv = self.qkv.weight.split([self.dim, 2 * kv])
            bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split([self.dim, 2 * kv])
            both = F.linear(context.flatten(1, -2), weight_kv, bias_kv)
            parts = (F.linear(x.flatten(1, -2), weight_q, bias_q), *both.chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.similarity == "cosine":
            query, key = unit_rows(query), unit_rows(key)
        return query.to(value.dtype), key.to(value.dtype), value

    def _attend(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        pre: HeadComposition,
        post: HeadComposition,
        key_mask: Bool[Tensor, "batch keys"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        query, scale = self.scaled(query)
        return composable_attention(
            query,
            key,
            value,
            pre,
            post,
            is_causal=is_causal,
            window=self.window,
            attn_mask=None if key_mask is None else key_mask[:, None, None],
            scale=scale,
            backend=self.backend,
        )

    def _rotated(self, query: Tensor, key: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """Queries and keys at their positions; the last query stands at the last key."""
        positions = torch.arange(seen, seen + key.shape[2], device=key.device)
        wide = torch.promote_types(key.dtype, torch.float32)
        frequencies = rotary_frequencies(self.rotary_dim, self.rotary or 1.0, device=key.device, dtype=wide)
        cos, sin = (table.to(key.dtype) for table in rotary_tables(positions, frequencies))
        at = key.shape[2] - query.shape[2]
        return rotate(query, cos[at:], sin[at:]), rotate(key, cos, sin)

    def _check_sequence(self, x: Tensor, context: Tensor | None, is_causal: bool, cache: KeyCache | None) -> None:
        """What holds only along a sequence: windows, rotary positions, caches."""
        name = type(self).__name__
        if cache is not None and not isinstance(cache, KeyCache):
            raise ValueError(
                f"{name} keeps no cache, got cache={type(cache).__name__}: pass None or a coterie.attention.KeyCache"
            )
        if cache is not None and (not is_causal or context is not None):
            raise ValueError(f"{name} takes a cache in causal self-attention only: pass is_causal=True and no context")
        for option in ("window", "rotary"):
            if getattr(self, option) is None:
                continue
            for tokens in (x, context):
                if tokens is not None and tokens.ndim != 3:
                    raise ValueError(
                        f"{option} is along a sequence (batch, tokens, dim), got a {tokens.ndim - 2}-dimensional grid"
                    )
            if option == "rotary" and context is not None and x.shape[1] > context.shape[1]:
                raise ValueError(
                    "rotary positions take the last query to stand at the last key, and so at least as many keys as "
                    f"queries, got {x.shape[1]} queries and {context.shape[1]} keys"
                )

    def extra_repr(self) -> str:
        kv = "" if self.kv_heads == self.num_heads else f", kv_heads={self.kv_heads}"
        window = "" if self.window is None else f", window={self.window}"
        return f"{super().extra_repr()}{kv}{window}"
