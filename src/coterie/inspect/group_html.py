"""Groups as HTML: tiles of those that show most, the table of their sizes, the data of the interactive picture."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence

import numpy as np

from coterie.inspect import page
from coterie.inspect.groups import StageGroups, by_block, interest, most_interesting
from coterie.inspect.page import text
from coterie.inspect.tiles import data_uri, draw_all_groups, draw_group

LEGEND = (
    '<span class="member"></span>members of the group &nbsp; <span class="key"></span>keys it chose; '
    "in the coloured pictures each colour is one group"
)


TILES = 8  # of a block: one row or two on a wide screen


def block_tiles(picture: np.ndarray, heads: Sequence[StageGroups], name: str, most_heads: int = 4) -> str:
    """One block in eight tiles: all groups of its first heads side by side, then the groups that show most."""
    tiles = []
    groups = TILES - min(len(heads), most_heads)
    for head in heads[:most_heads]:
        caption = f"head {head.head + 1} · all groups"
        alt = f"{name}, {head.label}, head {head.head + 1}: every token in the colour of its group"
        tiles.append(page.picture(data_uri(draw_all_groups(picture, head)), alt, caption))
    for head, group in _showpieces(heads, groups):
        count = int(head.counts[group])
        caption = f"head {head.head + 1} · {count} token{'s' if count != 1 else ''}"
        alt = f"{name}, {head.label}, head {head.head + 1}: group {group}, {count} tokens, and the keys it chose"
        tiles.append(page.picture(data_uri(draw_group(picture, head, group)), alt, caption))
    rows, columns = heads[0].grid
    more = f", {most_heads} of {len(heads)} heads shown" if len(heads) > most_heads else ""
    keys = (
        "every token a key of every group" if heads[0].attends_to_all else f"{heads[0].selected.shape[1]} keys a group"
    )
    about = f"{rows}×{columns} tokens, {keys}{more}"
    line = f"{text(heads[0].label)} <span class='muted'>· {about}</span>"
    return f'<div class="block"><h3>{line}</h3><div class="tiles">{"".join(tiles)}</div></div>'


def pick_blocks(blocks: Sequence[list[StageGroups]], count: int = 3) -> list[list[StageGroups]]:
    """The first block of each stage and the last of all, at most `count`, in order; where keys are chosen if any."""
    blocks = [heads for heads in blocks if not heads[0].attends_to_all] or blocks
    stages = [block[0].stage for block in blocks]
    chosen = sorted({stages.index(stage) for stage in set(stages)} | {len(blocks) - 1})
    if len(chosen) > count:
        chosen = [chosen[round(i * (len(chosen) - 1) / max(count - 1, 1))] for i in range(count)]
    return [blocks[index] for index in chosen]


def sizes_table(found: Sequence[StageGroups]) -> str:
    """How the tokens of one image spread over the groups, block by block."""
    rows = []
    for heads in by_block(list(found)):
        counts = np.concatenate([head.counts for head in heads])
        tokens, groups = heads[0].counts.sum(), heads[0].groups
        largest = max(head.counts.max() for head in heads)
        empty = float((counts == 0).mean())
        chosen = np.mean(
            [len(np.unique(head.selected[head.counts > 0])) / max(len(head.assignment), 1) for head in heads]
        )
        first = heads[0]
        rows.append(
            [
                text(first.label),
                f"{first.grid[0]}×{first.grid[1]}",
                str(len(heads)),
                str(groups),
                str(first.selected.shape[1]),
                f"{tokens / groups:.1f}",
                f"{largest} ({largest / max(tokens, 1):.0%})",
                f"{empty:.0%}{page.meter(empty, 'miss')}",
                f"{chosen:.0%}{page.meter(float(chosen))}",
            ]
        )
    head = [
        "block",
        "tokens",
        "heads",
        "groups",
        "keys",
        "even split",
        "largest group",
        "empty groups",
        "tokens chosen as a key",
    ]
    return page.table(head, rows, "Group sizes of each block")


def explorer(picture: np.ndarray, found: Sequence[StageGroups], name: str) -> str:
    """The interactive picture: image, assignments and keys of every block and head, packed, for explore.js."""
    from PIL import Image

    blocks = []
    for heads in by_block(list(found)):
        first = heads[0]
        group_bits = 8 if first.groups < 256 else 16
        key_bits = 16 if len(first.assignment) <= 65536 else 32
        packed = [
            {"assignment": _pack(head.assignment, group_bits), "selected": _pack(head.selected, key_bits)}
            for head in heads
        ]
        blocks.append(
            {
                "label": first.label, "grid": list(first.grid), "prefix": first.prefix, "groups": first.groups,
                "k": int(first.selected.shape[1]), "group_bits": group_bits, "key_bits": key_bits, "heads": packed,
            }
        )  # fmt: skip
    data = json.dumps({"blocks": blocks}, separators=(",", ":")).replace("<", "\\u003c")
    alt = f"{name}, as the network saw it"
    return (
        f'<div class="explorer"><img src="{data_uri(Image.fromarray(picture))}" alt="{text(alt)}">'
        f'<script type="application/json">{data}</script>'
        "<noscript><p class=note>Pointing at tokens needs JavaScript. The pictures below and the PNG files show groups "
        "too.</p></noscript></div>"
    )


def _showpieces(heads: Sequence[StageGroups], count: int) -> list[tuple[StageGroups, int]]:
    """The best group of each head, then the second best: the `count` with most to see."""
    ranked = []
    for head in heads:
        score = interest(head)
        ranked += [(place, -score[group], head, group) for place, group in enumerate(most_interesting(head, count))]
    ranked.sort(key=lambda entry: (entry[0], entry[1], entry[2].head))
    return [(head, group) for _, _, head, group in ranked[:count]]


def _pack(values: np.ndarray, bits: int) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(f"<u{bits // 8}").tobytes()).decode()
