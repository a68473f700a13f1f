"""Agent attention without training, for the self-attention of a diffusion model such as Stable Diffusion.

Agent Attention, arXiv 2312.08874, section 4.4. A trained model's queries, keys and values stay what they are; agents
are the queries of fewer, merged features. Two things make up for the missing training: the second softmax is softer,
with scale^k_scale2 instead of scale, and a part of the values is added back:

    Y = softmax(scale^k_scale2 Q A^T) softmax(scale A K^T) V + k_shortcut V

The agents may come from anywhere. Two ways are here: `merged_tokens`, the authors' (token merging, arXiv 2210.09461
and 2303.17604), of features in front of the query projection; and `pooled_agents`, averages of the queries over a
coarse grid. docs/models/agent-attention.md shows how to put them into a processor of diffusers.

Differences from the authors' code: logits are never rounded to half precision between product and softmax, so that
their option for float32 there has no counterpart; and whether agents pay, 2 agents < tokens there, is left to the
caller.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.attention._agent_bias import pooled
from coterie.attention.agent import axes_of
from coterie.attention.base import exact_attention

__all__ = ["diffusion_agent_attention", "merged_tokens", "pooled_agents"]


def diffusion_agent_attention(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    agents: Float[Tensor, "batch heads agents head_dim"],
    *,
    scale: float | None = None,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Self-attention through agents, with the weights of a model that was trained without them.

    Args:
        query, key, value: of the same tokens, projected.
        agents: queries of merged or pooled features, at most as many as tokens.
        scale: of the logits; head_dim^-0.5 if None.
        k_scale2: exponent of the scale in the second softmax.
        k_shortcut: how much of the values is added.

    Raises:
        ValueError: shapes that do not fit, or more agents than tokens.
    """
    if query.ndim != 4 or query.shape != key.shape or query.shape != value.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"query, key and value must have one shape (batch, heads, tokens, head_dim), got {shapes}")
    batch, heads, tokens, head_dim = query.shape
    if agents.ndim != 4 or agents.shape[:2] != query.shape[:2] or agents.shape[3] != head_dim:
        raise ValueError(
            f"agents must have shape (batch, heads, agents, head_dim) = ({batch}, {heads}, agents, {head_dim}), "
            f"got {tuple(agents.shape)}"
        )
    if agents.shape[2] > tokens:
        raise ValueError(f"agents must be at most as many as tokens, got {agents.shape[2]} agents for {tokens} tokens")
    scale = head_dim**-0.5 if scale is None else scale
    gathered = exact_attention(agents, key, value, scale=scale)
    return exact_attention(query, agents, gathered, scale=scale**k_scale2) + k_shortcut * value


def pooled_agents(
    query: Float[Tensor, "batch heads tokens head_dim"], grid: tuple[int, ...], agents: int | tuple[int, ...]
) -> Float[Tensor, "batch heads agents head_dim"]:
    """Averages of the queries over a coarse grid.

    Args:
        query: of the tokens of `grid`, in raster order.
        grid: tokens along each axis.
        agents: agents along each axis, one number for all or one per axis.

    Raises:
        ValueError: a grid of another number of tokens, or more agents than tokens along an axis.
    """
    counts = axes_of("agents", agents)
    counts = counts * (len(grid) // len(counts)) if len(counts) == 1 else counts
    if len(counts) != len(grid) or any(count > length for count, length in zip(counts, grid)):
        raise ValueError(f"agents must be at most as many as tokens along each axis of grid {grid}, got {counts}")
    if query.shape[2] != torch.Size(grid).numel():
        raise ValueError(f"query must have the {torch.Size(grid).numel()} tokens of grid {grid}, got {query.shape[2]}")
    return pooled(query, tuple(grid), counts)


def merged_tokens(
    x: Float[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    *,
    ratio: float,
    cell: int | tuple[int, int] = 2,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch merged dim"]:
    """Fewer tokens: those most alike to a chosen one are averaged into it.

    One token of each cell of the grid is chosen. Of the others, the ones most similar (by cosine) to a chosen token are
    merged into it until `ratio` of all tokens are gone; the rest stays as it is. No gradient flows through the choice.

    Args:
        x: tokens of `grid`, in raster order.
        grid: rows and columns.
        ratio: share of the tokens to merge; at most all that are not chosen.
        cell: rows and columns of a cell, one number or two. What is left over of the grid has no chosen token.
        generator: chooses at random; the first token of each cell without it.

    Returns:
        The tokens left over, then the chosen ones: (batch, tokens - merged, dim).

    Raises:
        ValueError: a grid of another number of tokens, cells that do not fit into it, or a ratio outside [0, 1).
    """
    rows, columns = grid
    down, across = (cell, cell) if isinstance(cell, int) else cell
    if x.ndim != 3 or x.shape[1] != rows * columns:
        raise ValueError(f"x must have shape (batch, {rows * columns}, dim) for grid {grid}, got {tuple(x.shape)}")
    if not (1 <= down <= rows and 1 <= across <= columns):
        raise ValueError(f"cell must fit into grid {grid}, got {cell!r}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be at least 0 and below 1, got {ratio}")
    chosen, others = _chosen(rows, columns, down, across, x.device, generator)
    merged = min(int(x.shape[1] * ratio), len(others))
    with torch.no_grad():
        unit = torch.nn.functional.normalize(x, dim=-1)
        likeness, nearest = (unit[:, others] @ unit[:, chosen].transpose(1, 2)).max(-1)  # (batch, others)
        order = likeness.argsort(-1, descending=True)
        target = nearest.gather(1, order[:, :merged])
    width = x.shape[2]
    sources = x[:, others].gather(1, order.unsqueeze(-1).expand(-1, -1, width))
    into = target.unsqueeze(-1).expand(-1, -1, width)
    kept = x[:, chosen].scatter_reduce(1, into, sources[:, :merged], "mean")
    return torch.cat([sources[:, merged:], kept], 1)


def _chosen(
    rows: int, columns: int, down: int, across: int, device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Indices of one token of each cell, and of all others, in raster order."""
    many = (rows // down, columns // across)
    if generator is None:
        place = torch.zeros(many, dtype=torch.int64, device=device)
    else:
        place = torch.randint(down * across, many, generator=generator, device=generator.device).to(device)
    row = torch.arange(many[0], device=device).unsqueeze(1) * down + place // across
    chosen = (row * columns + torch.arange(many[1], device=device) * across + place % across).flatten()
    other = torch.ones(rows * columns, dtype=torch.bool, device=device)
    other[chosen] = False
    return chosen, other.nonzero().flatten()
