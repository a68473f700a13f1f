"""Agent attention: a few agents gather what all tokens hold, and every token asks the agents. Linear in the tokens.

Agent Attention, arXiv 2312.08874 (ECCV 2024), section 3. The agents are the queries, averaged over a coarse grid:

    A = pool(Q)                            a few agents, e.g. 7 x 7
    V_A = softmax(s A K^T + B_1) V         agents gather from all tokens
    Y = softmax(s Q A^T + B_2) V_A         every token asks the agents

    x (batch, *grid, dim) -> query, key, value (batch, heads, tokens, head_dim)
      -> agents (batch, heads, agents, head_dim) -> output (batch, *grid, dim)

The paper adds learned biases B_1 and B_2 and a 3x3 depth-wise convolution of the values. Both are options, off by
default, so that a backbone has the same parameters with any mechanism.

Differences from the authors' code (LeapLabTHU/Agent-Attention): grids of any size and shape (there squares of one
size), masks, and an error where there are more agents than tokens, unless `repeat` allows it as it is there.
`coterie.attention.diffusion_agent` has the same without training, for the self-attention of diffusion models.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coterie.attention._agent_bias import AgentBias, pooled, pooled_of_real, reach_of
from coterie.attention.base import GridAttention, check_int, exact_attention, register_attention


@register_attention("agent")
class AgentAttention(GridAttention):
    """Attention through agents, which are averaged queries.

    Args:
        dim, num_heads, and the keywords of GridAttention.
        agents: agents along each axis, one number for all axes or one per axis (the paper: 3, 4, 7, 7 in its four
            stages, which is 9, 16, 49 and 49 agents on a 2-dimensional grid).
        repeat: allow more agents than there are tokens: tokens then count for several agents. An error if False.
        bias_size: tokens along each axis of the grid that learned biases are made for (one number: two axes that are
            alike); None for no biases. At other sizes the biases are interpolated linearly.
        dwc: add a 3x3 depth-wise convolution of the values to the output, on 2-dimensional grids.
        prefix_tokens: tokens without a place at the beginning of a sequence (class and register tokens). They ask the
            agents and the agents ask them, but they are not averaged and not convolved.
        k_scale2, k_shortcut: of the paper's attention without training (section 4.4 there; 0.3 and 0.075): the exponent
            of the scale of the second softmax, and how much of the values is added to the output.

    Attributes:
        grids: where the tokens of a sequence lie, number of tokens without the prefix -> grid. A sequence whose length
            is not in it is 1-dimensional.
    """

    grid_dims: ClassVar[frozenset[int]] = frozenset({1, 2, 3})
    patterns: ClassVar[frozenset[str]] = frozenset({"bidirectional self"})

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        agents: int | Sequence[int] = 7,
        repeat: bool = False,
        bias_size: int | Sequence[int] | None = None,
        dwc: bool = False,
        prefix_tokens: int = 0,
        k_scale2: float = 1.0,
        k_shortcut: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        self.agents = axes_of("agents", agents)
        check_int("prefix_tokens", prefix_tokens, 0)
        self.repeat, self.prefix_tokens = repeat, prefix_tokens
        self.k_scale2, self.k_shortcut = k_scale2, k_shortcut
        self.grids: dict[int, tuple[int, ...]] = {}
        self.key_bias: AgentBias | None = None
        self.query_bias: AgentBias | None = None
        if bias_size is not None:
            size = axes_of("bias_size", bias_size)
            size = size * 2 if isinstance(bias_size, int) else size
            made: dict[str, Any] = {"prefix_tokens": prefix_tokens, "device": device, "dtype": dtype}
            count = prod(self._agents(len(size)))
            self.key_bias = AgentBias(num_heads, count, size, **made)
            self.query_bias = AgentBias(num_heads, count, size, **made)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype) if dwc else None

    def mix(
        self,
        x: Float[Tensor, "batch *grid dim"],
        context: Tensor | None,
        *,
        mask: Bool[Tensor, " batch *grid"] | None,
        is_causal: bool,
    ) -> Float[Tensor, "batch *grid dim"]:
        query, key, value = self.project(x)
        grid = tuple(x.shape[1:-1])
        key_mask = None if mask is None else mask.flatten(1)
        y = self.attend(query, key, value, grid=grid, key_grid=None, mask=key_mask, is_causal=False)
        y = y.transpose(1, 2).flatten(2)
        if self.dwc is not None:
            y = self._with_neighbours(y, value, self._grid(grid), key_mask)
        return self.proj_drop(self.proj(y)).view(x.shape)

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
        grid = self._grid(grid)
        placed = query[:, :, self.prefix_tokens :]
        reach, of_keys, of_agents = None, None, None
        if mask is None:
            agents = pooled(placed, grid, self._agents(len(grid)))
        else:
            on_grid = mask[:, self.prefix_tokens :].unflatten(1, grid)
            reach = reach_of(on_grid)
            agents, some = pooled_of_real(placed, on_grid, self._agents(len(grid)), reach)
            of_keys, of_agents = mask[:, None, None], some[:, None, None]
        asking, scale = self.scaled(agents)
        query, _ = self.scaled(query)
        key_bias = query_bias = None
        if self.key_bias is not None and self.query_bias is not None:
            key_bias = self.key_bias(grid, reach)
            query_bias = self.query_bias(grid, reach, tokens_first=True)
        gathered = exact_attention(asking, key, value, allowed=of_keys, bias=key_bias, scale=scale)
        y = exact_attention(query, agents, gathered, allowed=of_agents, bias=query_bias, scale=scale**self.k_scale2)
        return y + self.k_shortcut * value if self.k_shortcut else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, agents={self.agents}, prefix_tokens={self.prefix_tokens}"

    def _agents(self, dims: int) -> tuple[int, ...]:
        """Agents along each of so many axes."""
        if len(self.agents) not in (1, dims):
            raise ValueError(f"agents={self.agents} must have one number, or one for each of {dims} axes of the grid")
        return self.agents * (dims // len(self.agents))

    def _grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Where the tokens behind the prefix lie, if that is a grid for which there are agents and biases."""
        if self.prefix_tokens or self.grids:
            if len(grid) > 1 or grid[0] <= self.prefix_tokens:
                raise ValueError(
                    f"x must be a sequence of more than its {self.prefix_tokens} prefix tokens for AgentAttention, "
                    f"got grid {grid}"
                )
            tokens = grid[0] - self.prefix_tokens
            grid = self.grids.get(tokens, (tokens,))
        agents = self._agents(len(grid))
        if prod(agents) > prod(grid) and not self.repeat:
            raise ValueError(
                f"AgentAttention has {prod(agents)} agents, {agents} along the axes, for {prod(grid)} tokens on grid "
                f"{grid}: take fewer agents, or let several stand for one token with repeat=True"
            )
        if self.key_bias is not None and len(self.key_bias.size) != len(grid):
            raise ValueError(
                f"x must have a {len(self.key_bias.size)}-dimensional grid, as bias_size={self.key_bias.size}, "
                f"got grid {grid}"
            )
        if self.dwc is not None and len(grid) != 2:
            raise ValueError(f"x must have a 2-dimensional grid for dwc=True, got grid {grid}")
        return grid

    def _with_neighbours(
        self,
        y: Float[Tensor, "batch tokens dim"],
        value: Float[Tensor, "batch heads tokens head_dim"],
        grid: tuple[int, ...],
        mask: Bool[Tensor, "batch tokens"] | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """`y` and the convolution of the values; prefix tokens have no neighbours, and padding counts as zero."""
        assert self.dwc is not None
        value = value.transpose(1, 2).flatten(2)
        if mask is not None:
            value = value.masked_fill(~mask.unsqueeze(-1), 0.0)
        prefix = self.prefix_tokens
        maps = value[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
        local = self.dwc(maps).permute(0, 2, 3, 1).flatten(1, 2)
        if not torch.is_grad_enabled():
            y[:, prefix:] += local  # y is attention's own output, which nobody else sees
            return y
        return y + local if not prefix else torch.cat([y[:, :prefix], y[:, prefix:] + local], 1)


def axes_of(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """One number, or one for each of up to three axes."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if not 1 <= len(sizes) <= 3:
        raise ValueError(f"{name} must be one number, or one per axis of a 1-, 2- or 3-dimensional grid, got {value!r}")
    for size in sizes:
        check_int(name, size)
    return sizes
