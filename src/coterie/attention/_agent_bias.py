"""The learned biases of agent attention, and how grids of any size, and padded ones, are pooled and interpolated.

A bias belongs to a pair of an agent and a place on the grid. It is the sum of a coarse table over the grid, which is
enlarged by (bi-, tri-) linear interpolation, and of one line per axis (rows, columns), made for one grid size; at
another size the lines are interpolated linearly, as the authors do when they load weights for larger images.

Where a mask keeps padding out, bins and interpolation go by how far the real tokens of each sample reach, so that a
sample in a padded batch is pooled, and gets the bias, as it would alone.
"""

from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coterie.attention._kept import Keeper

TABLE_SIDE = 7
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class AgentBias(Keeper):
    """One bias per head, agent and token; see the module's docstring.

    Args:
        num_heads: attention heads.
        agents: number of agents.
        size: tokens along each axis of the grid that the lines are made for.
        prefix_tokens: tokens without a place, in front of the grid's; each has a bias of its own.

    In inference the bias of the last grid is kept, as it depends on nothing but weights.

    Parameters: `table` (heads, agents, 7, ...), `lines` (heads, agents, n) per axis, `prefix` (heads, agents, tokens).
    """

    def __init__(
        self, num_heads: int, agents: int, size: tuple[int, ...], *, prefix_tokens: int = 0, device=None, dtype=None
    ) -> None:
        super().__init__()

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_heads, agents, *shape, device=device, dtype=dtype))

        self.size = size
        self.table = made(*(TABLE_SIDE,) * len(size))
        self.lines = nn.ParameterList([made(n) for n in size])
        self.prefix = made(prefix_tokens) if prefix_tokens else None
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self, grid: tuple[int, ...], reach: list[Int[Tensor, " batch"]] | None = None, *, tokens_first: bool = False
    ) -> Float[Tensor, "#batch heads agents tokens"] | Float[Tensor, "#batch heads tokens agents"]:
        """The bias for a grid of tokens; with `reach` (see `reach_of`) one for each sample."""

        def make() -> Tensor:
            bias = self._bias(grid, reach)
            return bias.transpose(-1, -2).contiguous() if tokens_first else bias

        return make() if reach is not None else self.kept((grid, tokens_first), make)

    def _bias(
        self, grid: tuple[int, ...], reach: list[Int[Tensor, " batch"]] | None
    ) -> Float[Tensor, "#batch heads agents tokens"]:
        heads, agents = self.table.shape[:2]
        bias = resized(self.table, grid, reach)
        for axis, line in enumerate(self.lines):
            along = resized(line, grid[axis : axis + 1], None if reach is None else reach[axis : axis + 1])
            bias = bias + along.reshape(*along.shape[:3], *(-1 if a == axis else 1 for a in range(len(grid))))
        bias = bias.reshape(-1, heads, agents, prod(grid))
        if self.prefix is None:
            return bias
        return torch.cat([self.prefix.expand(bias.shape[0], -1, -1, -1), bias], -1)


def resized(
    table: Float[Tensor, "heads agents *sizes"], grid: tuple[int, ...], reach: list[Int[Tensor, " batch"]] | None = None
) -> Float[Tensor, "#batch heads agents *grid"]:
    """Linear interpolation along each axis, over the whole grid or up to the `reach` of each sample."""
    dims = len(grid)
    if reach is None:
        if tuple(table.shape[2:]) == grid:
            return table.unsqueeze(0)
        return F.interpolate(table, size=grid, mode=_MODES[dims], align_corners=False).unsqueeze(0)
    table = table.unsqueeze(0)
    for axis, (length, end) in enumerate(zip(grid, reach)):
        size = table.shape[3 + axis]
        place = (torch.arange(length, device=end.device) + 0.5) * (size / end.unsqueeze(1).to(table.dtype)) - 0.5
        place = place.clamp(0, size - 1)  # (batch, length), in cells of the table
        weight = (1 - (place.unsqueeze(1) - torch.arange(size, device=end.device).unsqueeze(1)).abs()).clamp(min=0)
        weight = weight.to(table.dtype).reshape(-1, *(1,) * dims, size, length)
        table = (table.movedim(3 + axis, -1) @ weight).movedim(-1, 3 + axis)
    return table


def reach_of(mask: Bool[Tensor, " batch *grid"]) -> list[Int[Tensor, " batch"]]:
    """How far the real tokens of each sample reach along each axis, at least 1."""
    reach = []
    for axis in range(1, mask.ndim):
        others = [other for other in range(1, mask.ndim) if other != axis]
        some = mask.any(others) if others else mask
        reach.append((some * torch.arange(1, mask.shape[axis] + 1, device=mask.device)).amax(1).clamp(min=1))
    return reach


def pooled(
    query: Float[Tensor, "batch heads tokens head_dim"], grid: tuple[int, ...], agents: tuple[int, ...]
) -> Float[Tensor, "batch heads agents head_dim"]:
    """Adaptive average pooling of the queries on a grid to one of `agents`: bins cover it, and may overlap by a row."""
    if grid == agents:
        return query
    maps = query.transpose(1, 2).flatten(2).unflatten(1, grid).movedim(-1, 1)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(grid) - 1]
    y = pool(maps, agents if len(agents) > 1 else agents[0])  # type: ignore[arg-type]  # stubs know only lists
    return y.flatten(2).transpose(1, 2).unflatten(2, (query.shape[1], -1)).transpose(1, 2)


def pooled_of_real(
    query: Float[Tensor, "batch heads tokens head_dim"],
    mask: Bool[Tensor, " batch *grid"],
    agents: tuple[int, ...],
    reach: list[Int[Tensor, " batch"]],
) -> tuple[Float[Tensor, "batch heads agents head_dim"], Bool[Tensor, "batch agents"]]:
    """`pooled`, of the real tokens within the reach of each sample; and which agents have any."""
    member = torch.ones(mask.shape[0], 1, 1, dtype=torch.bool, device=mask.device)  # (batch, agents, tokens)
    for length, count, end in zip(mask.shape[1:], agents, reach):
        number = torch.arange(count, device=mask.device)
        end, place = end.unsqueeze(1), torch.arange(length, device=mask.device)
        first, past = number * end // count, -(-(number + 1) * end // count)
        inside = (place >= first.unsqueeze(-1)) & (place < past.unsqueeze(-1))  # (batch, count, length)
        member = (member[:, :, None, :, None] & inside[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    member = member & mask.flatten(1).unsqueeze(1)
    weight = member.to(query.dtype) / member.sum(-1, keepdim=True).clamp(min=1).to(query.dtype)
    return weight.unsqueeze(1) @ query, member.any(-1)
