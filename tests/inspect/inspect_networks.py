"""Networks and run folders for the tests of coterie.inspect, all made here."""

from __future__ import annotations

import torch
from torch import nn

PATCH = 4


class StripeAttention(nn.Module):
    """Groups known beforehand: in head h, group j holds the tokens of the rows r with (r + h) mod `groups` = j.

    Every group chooses the first `top_k` tokens, in falling order.
    """

    def __init__(self, heads: int = 2, groups: int = 4, top_k: int = 3) -> None:
        super().__init__()
        self.heads, self.groups, self.top_k = heads, groups, top_k

    def groups_of(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = x.shape[1:3]
        row = torch.arange(rows).repeat_interleave(columns)
        assignment = torch.stack([(row + head) % self.groups for head in range(self.heads)])[None]
        selected = torch.arange(self.top_k - 1, -1, -1).expand(1, self.heads, self.groups, self.top_k)
        return assignment, selected

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class StripeNet(nn.Module):
    """Two stages of one block each, on grids of 1/4 and 1/8 of the image."""

    feature_info = ({"reduction": 8},)

    def __init__(self, channels: int = 3, classes: int = 5, **attention: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, PATCH, PATCH)
        stage = [nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": StripeAttention(**attention)})])})]
        stage.append(nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": StripeAttention(**attention)})])}))
        self.stages = nn.ModuleList(stage)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        x = self.stages[0]["blocks"][0]["attn"](x)
        x = x[:, ::2, ::2]
        x = self.stages[1]["blocks"][0]["attn"](x)
        return self.head(self.dropout(x.mean((1, 2))))
