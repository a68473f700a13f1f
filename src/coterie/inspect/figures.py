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
    from matplotlib.figure import Figure

ACCENT, WARM, MUTED, INK = "#3366cc", "#e07b18", "#6b7482", "#1b2028"


def block_figure(picture: np.ndarray, heads: list[StageGroups], groups: int = 5, title: str = "") -> Figure:
    """The sheet of one block: `heads` are its heads (see `by_block`), `picture` is (height, width, 3) uint8."""
    from matplotlib.figure import Figure

    if not heads:
        raise ValueError("heads: got none, takes the heads of one block (see coterie.inspect.groups.by_block)")
    aspect = picture.shape[0] / picture.shape[1]
    cell_w, cell_h = (2.0, 2.0 * aspect) if aspect <= 1 else (2.0 / aspect, 2.0)
    chart_w = 2.1
    left, gap_x, gap_y, top, bottom = 0.62, 0.14, 0.40, 0.92, 0.46
    width = left + (groups + 1) * (cell_w + gap_x) + 0.55 + chart_w + 0.15
    height = top + len(heads) * (cell_h + gap_y) + bottom
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")

    def axes_at(x: float, y: float, w: float, h: float):
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    first = heads[0]
    rows, columns = first.grid
    keys = f"{first.selected.shape[1]} keys each. Blue: members. Orange: chosen keys (larger = more relevant)."
    keys = "every token is a key of every group. Blue: members." if first.attends_to_all else keys
    figure.text(
        left / width, 1 - 0.32 / height, title or first.label, fontsize=13, weight="bold", color=INK, va="center"
    )
    figure.text(
        left / width, 1 - 0.58 / height, va="center", fontsize=8.5, color=MUTED,
        s=f"{first.module or first.label}: {rows}×{columns} tokens, {len(heads)} heads, {first.groups} groups, "
        f"{keys}",
    )  # fmt: skip
    for index, head in enumerate(heads):
        y = top + index * (cell_h + gap_y)
        figure.text(
            0.28 / width,
            1 - (y + cell_h / 2) / height,
            f"head {head.head + 1}",
            rotation=90,
            ha="center",
            va="center",
            color=INK,
        )
        tiles = [("all groups", draw_all_groups(picture, head))]
        for group in most_interesting(head, groups):
            tiles.append((f"group {group} · {head.counts[group]} tokens", draw_group(picture, head, group)))
        for column, (caption, tile) in enumerate(tiles):
            axes = axes_at(left + column * (cell_w + gap_x), y, cell_w, cell_h)
            axes.imshow(tile)
            axes.set_axis_off()
            axes.set_title(caption, fontsize=8, color=MUTED, pad=3)
        chart = axes_at(left + (groups + 1) * (cell_w + gap_x) + 0.55, y, chart_w, cell_h)
        _sizes(chart, head.counts)
        if index == len(heads) - 1:
            chart.set_xlabel("group, largest first", fontsize=8, color=MUTED)
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


def _sizes(axes, counts: np.ndarray) -> None:
    ordered = np.sort(counts)[::-1]
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=ACCENT, alpha=0.85)
    axes.axhline(counts.mean(), color=WARM, linewidth=1)
    axes.set_xticks([0, len(ordered) - 1], ["1", str(len(ordered))])
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7, colors=MUTED)
    axes.set_title(f"tokens per group · {int((counts == 0).sum())} empty", fontsize=8, color=MUTED, pad=3)
