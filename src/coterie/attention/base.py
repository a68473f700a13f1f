"""What every attention mechanism here has in common: token grids, projections, argument checks, and the registry.

A mechanism is called as `m(x, context=None, *, mask=None, is_causal=False, cache=None)` on tokens laid out on a grid,

    x        (batch, *grid, dim)         1-, 2- or 3-dimensional grid; the output has the same shape
    context  (batch, *key_grid, dim)     where keys and values come from (cross-attention); x itself when absent
    mask     (batch, *key_grid) bool     True = a real token, False = padding that nobody attends to

and says in two class attributes what it can do: `grid_dims` and `patterns`. Everything else is refused with a
ValueError. All mechanisms hold the same two projections, `qkv` and `proj` in timm's layout, so that one backbone has
the same parameters with any of them; a subclass only writes `attend`. A query that no key is left for gets zeros from
attention, never NaN.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

PATTERNS = ("bidirectional self", "causal self", "bidirectional cross", "causal cross")
SIMILARITIES = ("dot", "cosine")
MAX_LOGIT_SCALE = math.log(100.0)

_MECHANISMS: dict[str, "type[GridAttention]"] = {}
Mechanism = TypeVar("Mechanism", bound="type[GridAttention]")


class GridAttention(nn.Module):
    """Multi-head attention over a token grid: projections and checks. A subclass says what it can do, writes `attend`.

    Args:
        dim: channels of a token, in and out.
        num_heads: attention heads; must divide `dim`.
        qkv_bias: whether the query, key and value projections have a bias.
        similarity: "dot" (logits `<q, k> / sqrt(head_dim)`) or "cosine" (SwinV2, arXiv 2111.09883: queries and keys of
            length one, and a learned temperature per head, `logit_scale`, that starts at 10 and stops at 100).
        proj_drop: dropout after the output projection.
        device, dtype: of the parameters.
    """

    grid_dims: ClassVar[frozenset[int]]
    patterns: ClassVar[frozenset[str]]
    operation: ClassVar[str] = "scaled_dot_product_attention"  # what it computes with: torch's, or one of coterie.ops

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        similarity: str = "dot",
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("dim", dim)
        check_int("num_heads", num_heads)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads={num_heads} and dim={dim}")
        check_choice("similarity", similarity, SIMILARITIES)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.similarity = similarity
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.q_norm = nn.Identity()  # where replace_attention puts the query and key norms of a model that has them
        self.k_norm = nn.Identity()
        if similarity == "cosine":
            start = torch.full((num_heads, 1, 1), math.log(10.0), device=device, dtype=dtype)
            self.logit_scale = nn.Parameter(start)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Float[Tensor, "batch *key_grid dim"] | None = None,
        *,
        mask: Bool[Tensor, " batch *key_grid"] | None = None,
        is_causal: bool = False,
        cache: None = None,
    ) -> Float[Tensor, "batch *grid dim"]:
        """Attend from the tokens of `x` to those of `context` (or of `x`).

        Causal attention takes the tokens of a grid in raster order, aligned at the end when there are fewer queries
        than keys.

        Raises:
            ValueError: for a grid, pattern, shape, device or dtype that this mechanism does not take, naming what it
                does.
            TypeError: for an argument of another type.
        """
        self.check(x, context, mask=mask, is_causal=is_causal)
        if cache is not None:
            raise ValueError(f"{type(self).__name__} keeps no cache, got cache={type(cache).__name__}: pass cache=None")
        return self.mix(x, context, mask=mask, is_causal=is_causal)

    def mix(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Float[Tensor, "batch *key_grid dim"] | None,
        *,
        mask: Bool[Tensor, " batch *key_grid"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch *grid dim"]:
        """`attend` between the projections, on checked arguments. A mechanism with more between them overrides this."""
        grid = tuple(x.shape[1:-1])
        key_grid = None if context is None else tuple(context.shape[1:-1])
        query, key, value = self.project(x, context)
        key_mask = None if mask is None else mask.flatten(1)
        y = self.attend(query, key, value, grid=grid, key_grid=key_grid, mask=key_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))

    def attend(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch heads keys head_dim"],
        value: Float[Tensor, "batch heads keys head_dim"],
        *,
        grid: tuple[int, ...],
        key_grid: tuple[int, ...] | None,
        mask: Bool[Tensor, "batch keys"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """The mechanism itself, between the projections: logits are `<q, k>` of `scaled(query)`, times its scale.

        Tokens are in the raster order of `grid` and of `key_grid`, which is None in self-attention; `mask` belongs to
        the keys.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend")

    def project(
        self, x: Float[Tensor, "batch *grid dim"], context: Float[Tensor, "batch *key_grid dim"] | None = None
    ) -> tuple[
        Float[Tensor, "batch heads queries head_dim"],
        Float[Tensor, "batch heads keys head_dim"],
        Float[Tensor, "batch heads keys head_dim"],
    ]:
        """Queries, keys and values per head, normalised where the model asks for it, not yet scaled."""
        if context is None:
            query, key, value = self._split(self.qkv(x.flatten(1, -2)), 3)
        else:
            weight_q, weight_kv = self.qkv.weight.split([self.dim, 2 * self.dim])
            bias_q, bias_kv = (None, None) if self.qkv.bias is None else self.qkv.bias.split([self.dim, 2 * self.dim])
            (query,) = self._split(F.linear(x.flatten(1, -2), weight_q, bias_q), 1)
            key, value = self._split(F.linear(context.flatten(1, -2), weight_kv, bias_kv), 2)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.similarity == "cosine":
            query, key = unit_rows(query), unit_rows(key)
        return query.to(value.dtype), key.to(value.dtype), value  # autocast leaves normalised ones in float32

    def scaled(
        self, query: Float[Tensor, "batch heads queries head_dim"]
    ) -> tuple[Float[Tensor, "batch heads queries head_dim"], float]:
        """The query and the scale to hand to an operation: the learned temperature goes into the query."""
        if self.similarity == "cosine":
            temperature = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
            return (query * temperature).to(query.dtype), 1.0
        return query, self.scale

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare, beyond biases."""
        return {"logit_scale"} if self.similarity == "cosine" else set()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, similarity={self.similarity}"

    def check(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Float[Tensor, "batch *key_grid dim"] | None = None,
        *,
        mask: Bool[Tensor, " batch *key_grid"] | None = None,
        is_causal: bool = False,
    ) -> None:
        """Refuse, in one line, what `forward` does not take."""
        name = type(self).__name__
        self._check_tokens("x", x)
        pattern = f"{'causal' if is_causal else 'bidirectional'} {'self' if context is None else 'cross'}"
        if pattern not in self.patterns:
            takes = ", ".join(p for p in PATTERNS if p in self.patterns)
            raise ValueError(f"{name} does not support {pattern} attention; it supports: {takes}")
        keys = x
        if context is not None:
            self._check_tokens("context", context)
            if context.shape[0] != x.shape[0]:
                raise ValueError(f"context must have the batch size of x, {x.shape[0]}, got {context.shape[0]}")
            keys = context
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor (True = a real token), got {got}")
        if mask.shape != keys.shape[:-1]:
            raise ValueError(
                f"mask must have the shape (batch, *key grid) = {tuple(keys.shape[:-1])}, got {tuple(mask.shape)}"
            )
        if mask.device != keys.device:
            raise ValueError(f"mask must be on the device of the tokens, {keys.device}, got {mask.device}")

    def _check_tokens(self, argument: str, x: Tensor) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise TypeError(f"{argument} must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{argument} must be a floating-point tensor, got {x.dtype}")
        if x.ndim - 2 not in self.grid_dims:
            dims = " or ".join(str(d) for d in sorted(self.grid_dims))
            raise ValueError(
                f"{argument} must be (batch, *grid, dim) with a {dims}-dimensional grid for {name}, "
                f"got shape {tuple(x.shape)}"
            )
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"{argument} must have {self.dim} channels in its last dimension, got shape {tuple(x.shape)}"
            )
        if 0 in x.shape:
            raise ValueError(f"{argument} must hold at least one token, got shape {tuple(x.shape)}")
        weight = getattr(self.qkv, "weight", None)
        if type(self.qkv) is not nn.Linear or weight is None:  # adapters and quantisation have their own rules
            return
        if x.device != weight.device:
            raise ValueError(f"{argument} must be on the device of {name}, {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{argument} must have the dtype of {name}, {weight.dtype}, got {x.dtype}")

    def _split(self, projected: Float[Tensor, "batch tokens parts_dim"], parts: int) -> tuple[Tensor, ...]:
        return projected.unflatten(-1, (parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)


def exact_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    *,
    allowed: Bool[Tensor, "#batch #heads #queries keys"] | None = None,
    bias: Float[Tensor, "#batch #heads queries keys"] | None = None,
    scale: float,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """torch's scaled_dot_product_attention, with zeros (and zero gradients) where a query may attend to nothing."""
    if allowed is None:
        bias = None if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    some = allowed.any(-1, keepdim=True)
    attn_mask = allowed | ~some
    if bias is not None:
        attn_mask = bias.to(query.dtype).masked_fill(~attn_mask, float("-inf"))
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, scale=scale)
    return y.masked_fill(~some, 0.0)


def unit_rows(x: Float[Tensor, "*rows channels"]) -> Float[Tensor, "*rows channels"]:
    """Rows of length one, computed in at least float32; a zero row stays zero."""
    wide = x if x.dtype == torch.float64 else x.float()
    return F.normalize(wide, dim=-1).to(x.dtype)


def check_int(name: str, value: object, least: int = 1) -> None:
    """A whole number of at least `least`, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of the given names, or an error that lists them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def register_attention(name: str) -> Callable[[Mechanism], Mechanism]:
    """Class decorator: make a GridAttention available as `create_attention(name, ...)`."""

    def register(mechanism: Mechanism) -> Mechanism:
        if name in _MECHANISMS:
            raise ValueError(f"an attention named {name!r} is registered already: {_MECHANISMS[name].__qualname__}")
        for attribute, known in (("grid_dims", {1, 2, 3}), ("patterns", set(PATTERNS))):
            declared = getattr(mechanism, attribute, None)
            if not declared or not set(declared) <= known:
                raise ValueError(
                    f"{mechanism.__name__}.{attribute} must be a non-empty subset of {known}, got {declared}"
                )
        _MECHANISMS[name] = mechanism
        return mechanism

    return register


def list_attention() -> list[str]:
    """Names that `create_attention` takes, sorted."""
    return sorted(_MECHANISMS)


def attention_class(name: str) -> type[GridAttention]:
    """The class behind a name, to read its `grid_dims`, `patterns` and options from."""
    if name not in _MECHANISMS:
        raise ValueError(f"attention must be one of {', '.join(map(repr, list_attention()))}, got {name!r}")
    return _MECHANISMS[name]


def attention_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a mechanism beyond dim and num_heads: name to its signature parameter (default and annotation)."""
    mechanism = attention_class(name)
    options: dict[str, inspect.Parameter] = {}
    for cls in reversed(mechanism.__mro__):
        if issubclass(cls, GridAttention):
            for key, parameter in inspect.signature(cls).parameters.items():
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    options[key] = parameter
    return options


def create_attention(name: str, dim: int, num_heads: int, *, block_index: int = 0, **options: Any) -> GridAttention:
    """Build a mechanism by name.

    Args:
        name: one of `list_attention()`.
        dim, num_heads: channels of a token and attention heads.
        block_index: which block of its stage this is: mechanisms that alternate (windows that shift) go by it, others
            ignore it.
        **options: as the mechanism's class takes them.

    Raises:
        ValueError: for an unknown name, an option that this mechanism does not have, or a value it does not take.
    """
    known = attention_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(sorted(set(known) - {"block_index"}))
        raise ValueError(f"attention {name!r} has no option {', '.join(map(repr, unknown))}; it takes: {takes}")
    if "block_index" in known:
        options["block_index"] = block_index
    return attention_class(name)(dim, num_heads, **options)
