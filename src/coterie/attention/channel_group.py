"""Channel group attention: channels attend to channels, inside groups; global over the tokens, and linear in them.

DaViT, arXiv 2204.03645 (ECCV 2022), section 3.3. The channels of a head are its tokens, and their values at the N
positions of the image are their features. With q, k, v (N, head_dim) of a head,

    A = softmax over the last axis of (scale k^T v)   (head_dim, head_dim)          y = q A^T   (N, head_dim)

    x (batch, *grid, dim) -> maps A (batch, heads, head_dim, head_dim) -> y (batch, *grid, dim)

That is the order in which the authors' code uses the three parts of `qkv`, and so the one of all released DaViT models;
the paper's softmax(Q^T K) V^T is `order="qkv"`, as in the vision tower of Florence-2 (arXiv 2311.06242).

A token meets the others only through A, and everything else is linear. Where an image has more tokens than channels,
queries, keys and values are therefore never made: k^T v = W_k (x^T x) W_v^T takes x^T x, and projections, map and
output projection multiply to one matrix per image, applied to x. That is half of the arithmetic, a third of it in
training, and no tensors of the size of qkv (`form`).

k^T v sums over all tokens, so its logits grow with the image. It is computed at least in float32, whatever the dtype
and whatever autocast says.
"""

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.attention.base import MAX_LOGIT_SCALE, GridAttention, check_choice, register_attention
from coterie.ops._state import autocasting

SCALES = ("head", "tokens")
ORDERS = ("kvq", "qkv")
FORMS = ("auto", "projected", "composed")
TOKENS_PER_CHANNEL = 1.25  # from here on the composed form is faster: it has dim^3 work per image beside that per token
CHUNK = 4096  # tokens whose outer products are summed together: other threads take other chunks


@register_attention("channel_group")
class ChannelGroupAttention(GridAttention):
    """Attention among the channels of each head, computed over all tokens.

    Args:
        dim, num_heads, and the keywords of GridAttention. A head is a group of channels. `similarity="cosine"` gives
            each channel's values over the tokens length one, as XCiT (arXiv 2106.09681) does.
        scale: of the logits: "head" for head_dim^-0.5 (DaViT), or "tokens" for N^-0.5 with N the real tokens of the
            image (Florence-2), with which logits do not grow with the image.
        order: which parts of `qkv` make the map, and which it is applied to: "kvq" for k^T v applied to q, as the
            authors' code has it, or "qkv" for q^T k applied to v, as the paper and Florence-2 have it.
        form: "composed", the short way above; "projected", by queries, keys and values; or "auto", the faster one.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})
    operation: ClassVar[str] = "matmul"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        scale: str = "head",
        order: str = "kvq",
        form: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        check_choice("scale", scale, SCALES)
        check_choice("order", order, ORDERS)
        check_choice("form", form, FORMS)
        self.scale_by, self.order, self.form = scale, order, form

    def mix(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Tensor | None,
        *,
        mask: Bool[Tensor, " batch *grid"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch *grid dim"]:
        tokens = x.flatten(1, -2)
        real = None if mask is None else mask.flatten(1)
        y = self._composed(tokens, real) if self._composes(tokens) else self._projected(tokens, real)
        return self.proj_drop(y.reshape(x.shape))

    def maps(
        self, x: Float[Tensor, "batch *grid dim"], *, mask: Bool[Tensor, " batch *grid"] | None = None
    ) -> Float[Tensor, "batch heads head_dim head_dim"]:
        """Look at the attention maps that `forward` would use: no gradient flows. Rows sum to one."""
        self.check(x, mask=mask)
        with torch.no_grad():
            left, right, _ = self._parts(x.flatten(1, -2))
            return self._map(left, right, None if mask is None else mask.flatten(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale_by}, order={self.order}, form={self.form}"

    def _composes(self, tokens: Float[Tensor, "batch tokens dim"]) -> bool:
        """Whether queries, keys and values need not be made."""
        plain = type(self.qkv) is nn.Linear and type(self.proj) is nn.Linear  # no adapters, no quantised weights
        plain = plain and isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        plain = plain and self.similarity == "dot"
        if self.form == "composed" and not plain:
            raise ValueError("form='composed' needs plain linear projections and logits; use form='auto'")
        if self.form != "auto":
            return self.form == "composed"
        half = tokens.dtype not in (torch.float32, torch.float64) or autocasting(tokens.device.type)
        return plain and not half and tokens.shape[1] >= TOKENS_PER_CHANNEL * self.dim

    def _projected(
        self, tokens: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens dim"]:
        left, right, applied = self._parts(tokens)
        weights = self._map(left, right, mask).to(applied.dtype)
        y = applied @ weights.transpose(-1, -2)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _composed(
        self, tokens: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, "batch tokens dim"]:
        weights = dict(zip("qkv", self.qkv.weight.split(self.dim)))
        if self.qkv.bias is not None:  # as one more input channel, which is 1 everywhere
            biases = self.qkv.bias.split(self.dim)
            weights = {part: torch.cat([weights[part], b[:, None]], 1) for part, b in zip("qkv", biases)}
        left, right, applied = (weights[part] for part in self.order)
        with _full_precision(tokens):
            wide = torch.promote_types(tokens.dtype, torch.float32)
            gram = _gram(tokens.to(wide), mask, self.qkv.bias is not None)
            some = F.linear(gram, right.to(wide)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            logits = left.to(wide).unflatten(0, (self.num_heads, -1)) @ some  # (batch, heads, head_dim, head_dim)
            attention = self._softmax(logits, tokens.shape[1], mask)
        out = self.proj.weight.unflatten(1, (self.num_heads, -1)).transpose(0, 1)  # (heads, dim, head_dim)
        out = out @ attention.to(out.dtype)
        whole = out.transpose(1, 2).flatten(2) @ applied  # (batch, dim, dim), and a column for the bias
        matrix = whole[..., : self.dim].transpose(1, 2)
        bias = None if self.proj.bias is None else self.proj.bias
        if self.qkv.bias is not None:
            bias = whole[..., None, :, -1] if bias is None else whole[..., None, :, -1] + bias
        return tokens @ matrix if bias is None else torch.baddbmm(bias.expand(len(tokens), 1, -1), tokens, matrix)

    def _parts(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> tuple[
        Float[Tensor, "batch heads tokens head_dim"],
        Float[Tensor, "batch heads tokens head_dim"],
        Float[Tensor, "batch heads tokens head_dim"],
    ]:
        """The two parts that make the map, and the one it is applied to."""
        query, key, value = self._split(self.qkv(tokens), 3)
        parts = {"q": self.q_norm(query), "k": self.k_norm(key), "v": value}
        left, right, applied = (parts[part].to(value.dtype) for part in self.order)
        return left, right, applied

    def _map(
        self,
        left: Float[Tensor, "batch heads tokens head_dim"],
        right: Float[Tensor, "batch heads tokens head_dim"],
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch heads head_dim head_dim"]:
        with _full_precision(left):
            wide = torch.promote_types(left.dtype, torch.float32)
            left, right = left.to(wide), right.to(wide)
            if mask is not None:
                left, right = (part.masked_fill(~mask[:, None, :, None], 0.0) for part in (left, right))
            if self.similarity == "cosine":
                left, right = F.normalize(left, dim=2), F.normalize(right, dim=2)
            return self._softmax(left.transpose(-1, -2) @ right, left.shape[2], mask)

    def _softmax(
        self,
        logits: Float[Tensor, "batch heads head_dim head_dim"],
        tokens: int,
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch heads head_dim head_dim"]:
        """The map; zeros for an image without real tokens."""
        if self.similarity == "cosine":
            logits = logits * self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        elif self.scale_by == "head":
            logits = logits * self.scale
        elif mask is None:
            logits = logits * tokens**-0.5
        else:
            logits = logits * mask.sum(-1).clamp(min=1)[:, None, None, None].to(logits.dtype).rsqrt()
        weights = logits.softmax(-1)
        return weights if mask is None else weights * mask.any(-1)[:, None, None, None]


def _gram(
    x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None, ones: bool
) -> Float[Tensor, "batch inputs inputs"]:
    """x^T x over the real tokens of each image; with `ones`, x has one more channel, which is 1 everywhere."""
    batch, tokens = x.shape[:2]
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
    chunks = tokens // CHUNK if tokens % CHUNK == 0 else 1
    parts = x.unflatten(1, (chunks, -1)).flatten(0, 1) if chunks > 1 else x
    gram = (parts.transpose(1, 2) @ parts).unflatten(0, (batch, chunks)).sum(1)
    if not ones:
        return gram
    sums = x.sum(1)
    count = x.new_full((batch,), tokens) if mask is None else mask.sum(1).to(x.dtype)
    below = torch.cat([sums, count[:, None]], 1)
    return torch.cat([torch.cat([gram, sums[:, None]], 1), below[..., None]], 2)


def _full_precision(x: Tensor) -> Any:
    """A region in which autocast leaves matrix products alone."""
    return torch.autocast(x.device.type, enabled=False) if autocasting(x.device.type) else nullcontext()
