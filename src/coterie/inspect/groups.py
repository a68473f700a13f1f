"""Reads the groups of dynamic group attention out of a network while it looks at one image.

Every module with a method `groups_of(x, mask=None) -> (assignment, selected)` is asked, on the very input it gets in
the forward pass, which group each of its queries falls into and which keys each group chose. So what is shown is what
the network does, whatever surrounds the attention (a DGT, or a ViT after `coterie.replace_attention`).

    image (3, H, W) --network--> module "stages.0.blocks.0.attn" sees x (1, h, w, dim)
                                   groups_of(x): assignment (1, heads, h*w), selected (1, heads, groups, k)
                                   -> one StageGroups for each head
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass
class StageGroups:
    """The groups of one head of one block, for one image.

    `stage`, `block` and `head` count from 0. Tokens are numbered row by row over `grid` (rows, columns) after `prefix`
    tokens that have no place in the image (a class token): token t stands at cell t - prefix.
    """

    stage: int
    block: int
    head: int
    grid: tuple[int, int]
    assignment: np.ndarray  # (tokens,) int64: the group of each query
    selected: np.ndarray  # (groups, k) int64: the keys each group chose, in rising order
    counts: np.ndarray = field(repr=False)  # (groups,) int64: queries in each group
    module: str = ""
    prefix: int = 0

    @property
    def groups(self) -> int:
        """How many groups the head has, empty ones included."""
        return len(self.counts)

    @property
    def attends_to_all(self) -> bool:
        """Whether there are no more tokens than keys to choose, so that every group chooses all of them."""
        return self.selected.shape[1] >= len(self.assignment)

    @property
    def label(self) -> str:
        """What a person calls this block: 'stage 1, block 1'."""
        return f"stage {self.stage + 1}, block {self.block + 1}"

    def members(self, group: int) -> np.ndarray:
        """Cells of the grid (row-major) whose queries are in `group`."""
        cells = np.flatnonzero(self.assignment == group) - self.prefix
        return cells[cells >= 0]

    def keys(self, group: int) -> np.ndarray:
        """Cells that `group` chose as keys, in rising order. Prefix tokens have no cell and are left out."""
        cells = self.selected[group] - self.prefix
        return cells[cells >= 0]


def attention_modules(model: nn.Module) -> tuple[list[str], Counter[str]]:
    """Names of the modules whose groups can be shown, and how many other attention modules there are of each class."""
    with_groups: list[str] = []
    others: Counter[str] = Counter()
    for name, module in _modules(model):
        if callable(getattr(module, "groups_of", None)):
            with_groups.append(name)
        elif hasattr(module, "patterns") or _looks_like_attention(module):
            others[type(module).__name__] += 1
    return with_groups, others


def explain_no_groups(model: nn.Module) -> str:
    """One sentence for a network without dynamic groups: what attention it has, and what can be shown instead."""
    _, others = attention_modules(model)
    kinds = (
        ", ".join(f"{count} × {name}" for name, count in others.most_common()) or "no attention module that is known"
    )
    return (
        f"this network has no dynamic groups to show (it has {kinds}); its predictions are shown instead. "
        "Groups come from dynamic group attention: a dgt_* model, or coterie.replace_attention(model, 'dynamic_group')."
    )


def inspect_groups(
    model: nn.Module, image: Float[Tensor, "channels height width"] | Float[Tensor, "1 channels height width"]
) -> list[StageGroups]:
    """Groups of every block and head of `model` for one image, in the order in which the blocks run.

    The image is normalised as the model expects it; the model is put in eval mode for the pass and then back.
    Returns an empty list for a network without dynamic groups (see `explain_no_groups`).

    Raises:
        TypeError: image is not a floating-point tensor.
        ValueError: image has another rank, or holds NaN or infinity, or a block's tokens fit no grid.
    """
    return look(model, image)[0]


@torch.no_grad()
def look(model: nn.Module, image: Tensor) -> tuple[list[StageGroups], Tensor]:
    """As `inspect_groups`, and the network's output of the same pass."""
    image = _check_image(image)
    seen: list[tuple[str, nn.Module, Tensor, Tensor | None]] = []
    hooks = []
    for name, module in _modules(model):
        if callable(getattr(module, "groups_of", None)):
            hooks.append(module.register_forward_pre_hook(_recorder(name, seen), with_kwargs=True))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    found: list[StageGroups] = []
    try:
        output = _unwrap(model)(image)
        for hook in hooks:
            hook.remove()
        height, width = image.shape[-2:]
        places = _places([name for name, *_ in seen])
        for (name, module, x, mask), (stage, block) in zip(seen, places, strict=True):
            grid, prefix = _grid_of(x, height, width, name, model)
            groups_of = cast(Callable[..., tuple[Tensor, Tensor]], module.groups_of)
            assignment, selected = groups_of(x, mask=mask)
            groups = selected.shape[2]
            for head in range(assignment.shape[1]):
                own = assignment[0, head].cpu().numpy()
                counts = np.bincount(own[own >= 0], minlength=groups)
                chosen = selected[0, head].cpu().numpy()
                found.append(StageGroups(stage, block, head, grid, own, chosen, counts, name, prefix))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return found, output


def interest(head: StageGroups) -> np.ndarray:
    """How much there is to see in each group, (groups,) float: large groups that hold together in the image come first.

    The square root of the group's share of all tokens, times the share of its 4-neighbour edges that stay inside the
    group (plus a quarter, so that scattered groups are not lost). Empty groups have 0.
    """
    rows, columns = head.grid
    cells = head.assignment[head.prefix : head.prefix + rows * columns].reshape(rows, columns)
    size = np.bincount(cells[cells >= 0], minlength=head.groups).astype(float)
    inside, edges = np.zeros(head.groups), np.zeros(head.groups)
    for one, other in ((cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])):
        same = one == other
        for side in (one, other):
            valid = side >= 0
            inside += np.bincount(side[same & valid], minlength=head.groups)
            edges += np.bincount(side[valid], minlength=head.groups)
    return np.sqrt(size / max(size.sum(), 1)) * (0.25 + inside / np.maximum(edges, 1))


def most_interesting(head: StageGroups, count: int) -> list[int]:
    """Up to `count` groups worth a look: by `interest`, less for a group whose keys are those of one already taken."""
    score = interest(head)
    keys = [set(row.tolist()) for row in head.selected]
    taken: list[int] = []
    while len(taken) < count:
        best, best_score = -1, 0.0
        for group in np.flatnonzero(score > 0):
            if group in taken:
                continue
            overlap = max((len(keys[group] & keys[t]) / max(len(keys[group] | keys[t]), 1) for t in taken), default=0.0)
            if score[group] * (1 - 0.5 * overlap) > best_score:
                best, best_score = int(group), score[group] * (1 - 0.5 * overlap)
        if best < 0:
            break
        taken.append(best)
    return taken


def by_block(found: list[StageGroups]) -> list[list[StageGroups]]:
    """The heads of each block together, in the order of the network."""
    blocks: dict[tuple[str, int, int], list[StageGroups]] = {}
    for head in found:
        blocks.setdefault((head.module, head.stage, head.block), []).append(head)
    return list(blocks.values())


def _looks_like_attention(module: nn.Module) -> bool:
    """For networks that are not ours: named so, with parameters of its own."""
    return type(module).__name__.endswith("Attention") and next(module.parameters(), None) is not None


def _unwrap(model: nn.Module) -> nn.Module:
    """The eager module inside torch.compile's or DistributedDataParallel's wrapper: forward hooks run there."""
    for attribute in ("_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            return _unwrap(inner)
    return model


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return _unwrap(model).named_modules()


def _recorder(name: str, seen: list[Any]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that keeps what a module is called with."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x")
        context = args[1] if len(args) > 1 else kwargs.get("context")
        if context is None and isinstance(x, Tensor):  # cross-attention: the keys are not in this image
            seen.append((name, module, x.detach(), kwargs.get("mask")))

    return record


def _check_image(image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = f"a {image.dtype} tensor" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"image: got {kind}, takes a floating-point tensor (channels, height, width), normalised for the model"
        )
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[0] != 1 or 0 in image.shape:
        raise ValueError(f"image: got shape {tuple(image.shape)}, takes one image: ([1,] channels, height, width)")
    if not torch.isfinite(image).all():
        raise ValueError("image: holds NaN or infinity; check the picture and its normalisation")
    return image


def _places(names: list[str]) -> list[tuple[int, int]]:
    """(stage, block) of each module, by the numbers in its dotted name ('stages.2.blocks.5.attn'), else counted."""
    numbers = [[int(n) for n in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)] for name in names]
    if all(len(n) >= 2 for n in numbers) and len({tuple(n[:2]) for n in numbers}) == len(names):
        return [(n[0], n[1]) for n in numbers]
    if all(len(n) == 1 for n in numbers) and len({n[0] for n in numbers}) == len(names):
        return [(0, n[0]) for n in numbers]
    return [(0, index) for index in range(len(names))]


def _grid_of(x: Tensor, height: int, width: int, name: str, model: nn.Module) -> tuple[tuple[int, int], int]:
    """Rows and columns of a block's tokens, and how many tokens before them have no place in the image."""
    if x.ndim == 4:
        return (x.shape[1], x.shape[2]), 0
    if x.ndim != 3:
        raise ValueError(
            f"{name}: its tokens have shape {tuple(x.shape)}; groups are drawn for (1, [rows,] tokens, dim)"
        )
    tokens = x.shape[1]
    known = getattr(_unwrap(model), "num_prefix_tokens", None)
    for prefix in [known] if isinstance(known, int) else range(3):
        grid = _grid_of_area(tokens - prefix, height, width)
        if grid:
            return grid, prefix
    raise ValueError(f"{name}: {tokens} tokens fit no grid over an image of {height}x{width} pixels")


def _grid_of_area(area: int, height: int, width: int) -> tuple[int, int] | None:
    """rows x columns = area with the proportions of the image, if there are any within a tenth."""
    for rows in range(1, area + 1):
        if area % rows == 0 and abs((rows / (area // rows)) / (height / width) - 1) < 0.1:
            return rows, area // rows
    return None
