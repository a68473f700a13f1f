"""The PNG files of `coterie inspect`: one sheet per block, one figure of group sizes per network.

A sheet has one row per head. Left: all groups of the head at once, each token in its group's colour. Then the groups
that show most, each with its members in blue and the keys it chose in orange. Right: how large the groups are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coterie.inspect.groups import StageGroups, by_block, most_interesting
from coterie.inspect.tiles import draw_all_groups, draw_group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, TOP, GAP_X, GAP_Y, CHART = 0.62, 0.98, 0.14, 0.40, 2.2  # of a sheet, in inches
ACCENT, WARM, MUTED, INK = "#3366cc", "#e07b18", "#6b7482", "#1b2028"


def block_figure(picture: np.ndarray, heads: list[StageGroups], groups: int = 5, title: str = "") -> Figure:
    """The sheet of one block: `heads` are its heads (see `by_block`), `picture` is (height, width, 3) uint8."""
    from matplotlib.figure import Figure

    if not heads:
        raise ValueError("heads: got none, takes the heads of one block (see coterie.inspect.groups.by_block)")
    first = heads[0]
    aspect = picture.shape[0] / picture.shape[1]
    tile_w, tile_h = (2.0, 2.0 * aspect) if aspect <= 1 else (2.0 / aspect, 2.0)
    chart_x = LEFT + (groups + 1) * (tile_w + GAP_X) + 0.55
    width, height = chart_x + CHART + 0.2, TOP + len(heads) * (tile_h + GAP_Y) + 0.2
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    # One pair of axes for everything, in inches from the top left: fifty pairs take seconds to draw.
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_axis_off()
    sheet.text(LEFT, 0.32, title or first.label, fontsize=13, weight="bold", color=INK, va="center")
    sheet.text(LEFT, 0.58, _about(first, len(heads)), fontsize=8.5, color=MUTED, va="center")
    for index, head in enumerate(heads):
        y = TOP + index * (tile_h + GAP_Y)
        sheet.text(0.28, y + tile_h / 2, f"head {head.head + 1}", rotation=90, ha="center", va="center", color=INK)
        tiles = [("all groups", draw_all_groups(picture, head))]
        for group in most_interesting(head, groups):
            tiles.append((f"group {group} · {head.counts[group]} tokens", draw_group(picture, head, group)))
        for column, (caption, tile) in enumerate(tiles):
            x = LEFT + column * (tile_w + GAP_X)
            sheet.imshow(tile, extent=(x, x + tile_w, y + tile_h, y))
            sheet.text(x + tile_w / 2, y - 0.04, caption, fontsize=8, color=MUTED, ha="center", va="bottom")
        _draw_sizes(sheet, head.counts, chart_x, y, tile_h)
    sheet.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    return figure


def sizes_figure(found: list[StageGroups], title: str = "Group sizes") -> Figure:
    """How evenly tokens spread over groups in each block: sizes relative to an even split, and empty groups."""
    from matplotlib.figure import Figure

    blocks = by_block(found)
    if not blocks:
        raise ValueError("found: got no groups, takes what inspect_groups returned for a network with dynamic groups")
    figure = Figure(figsize=(max(6.0, 1.6 + 0.42 * len(blocks)), 4.6), dpi=110, facecolor="white", layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.3))
    data = [np.concatenate([h.counts * h.groups / max(h.counts.sum(), 1) for h in heads]) for heads in blocks]
    positions = np.arange(len(blocks))
    boxes = upper.boxplot(
        data,
        positions=positions,
        widths=0.6,
        patch_artist=True,
        flierprops={"markersize": 2.5, "markeredgecolor": MUTED},
    )
    for box in boxes["boxes"]:
        box.set(facecolor="#dbe6fb", edgecolor=ACCENT)
    for line in boxes["medians"]:
        line.set(color=ACCENT, linewidth=1.6)
    upper.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    upper.set_ylabel("size ÷ even split")
    upper.set_title(title, loc="left", fontsize=12, weight="bold", color=INK)
    lower.bar(
        positions,
        [100 * np.mean(np.concatenate([h.counts for h in heads]) == 0) for heads in blocks],
        color=WARM,
        width=0.6,
    )
    lower.set_ylabel("empty, %")
    lower.set_xticks(positions, [f"{h[0].stage + 1}.{h[0].block + 1}" for h in blocks])
    lower.set_xlabel("stage.block")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _about(head: StageGroups, heads: int) -> str:
    keys = f"{head.selected.shape[1]} keys each. Blue: members. Orange: chosen keys."
    if head.attends_to_all:
        keys = "every token is a key of every group. Blue: members."
    size = f"{head.grid[0]}×{head.grid[1]} tokens, {heads} heads, {head.groups} groups"
    return f"{head.module or head.label}: {size}, {keys}"


def _draw_sizes(sheet: Axes, counts: np.ndarray, x: float, y: float, height: float) -> None:
    """Tokens per group, the largest group first, as steps in a box at (x, y); the mean as a line."""
    ordered = np.sort(counts)[::-1]
    bottom = y + height
    scale = (height - 0.12) / max(int(ordered[0]), 1)
    edges = np.linspace(x, x + CHART, len(ordered) + 1)
    tops = bottom - np.append(ordered, ordered[-1]) * scale
    sheet.fill_between(edges, bottom, tops, step="post", color=ACCENT, alpha=0.85, linewidth=0)
    sheet.plot([x, x + CHART], [bottom, bottom], color=MUTED, linewidth=0.8)
    mean = bottom - counts.mean() * scale
    sheet.plot([x, x + CHART], [mean, mean], color=WARM, linewidth=1)
    sheet.text(x + CHART, mean - 0.02, f"mean {counts.mean():.1f}", fontsize=7, color=WARM, ha="right", va="bottom")
    sheet.text(x - 0.05, bottom - ordered[0] * scale, str(ordered[0]), fontsize=7, color=MUTED, ha="right", va="center")
    caption = f"tokens per group, largest first · {int((counts == 0).sum())} empty"
    sheet.text(x + CHART / 2, y - 0.04, caption, fontsize=8, color=MUTED, ha="center", va="bottom")
