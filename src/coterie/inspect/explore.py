"""`coterie inspect`: looks at pictures through a network and writes what its groups do, as PNG files and one page.

index.html             the interactive page: point at a token, see its group and the keys it chose, in every head
NAME-stage1-block1.png one sheet per block: heads side by side, the groups that show most, sizes of all groups
NAME-sizes.png         how evenly the tokens spread over the groups, block by block
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import nn

from coterie.attention import BiLevelRoutingAttention, MovingCentroids
from coterie.engine.files import atomic_write
from coterie.inspect import page
from coterie.inspect.figures import block_figure, sizes_figure
from coterie.inspect.group_html import LEGEND, block_tiles, explorer, pick_blocks, sizes_table
from coterie.inspect.groups import attention_modules, by_block, explain_no_groups
from coterie.inspect.network import Network, View
from coterie.inspect.page import text
from coterie.inspect.tiles import data_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"


@dataclass
class Written:
    """What `explore` wrote: the page, and for each picture its name, what the network saw, and its PNG files."""

    page: Path
    views: list[tuple[str, View, list[Path]]]


def explore(
    network: Network,
    images: Sequence[tuple[str, Image.Image]],
    out: str | Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Written:
    """Show `network` the named pictures and write the page and the PNG files into the folder `out`.

    Raises:
        ValueError: no pictures, or one that cannot be shown.
        OSError: `out` cannot be written.
    """
    if not images:
        raise ValueError("images: got none, takes at least one picture")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; takes a folder")
    views: list[tuple[str, View]] = []
    for name, image in images:
        try:
            views.append((name, network.look(image)))
        except ValueError as error:
            raise ValueError(f"image {name}: {error}") from error
    written = []
    for (name, view), stem in zip(views, _stems([name for name, _ in views]), strict=True):
        files = []
        for heads in by_block(view.found):
            progress(f"{name}: {heads[0].label}")
            place = out / f"{stem}-stage{heads[0].stage + 1}-block{heads[0].block + 1}.png"
            files.append(_save(block_figure(view.picture, heads, title=f"{name}: {heads[0].label}"), place))
        if view.found:
            files.append(
                _save(
                    sizes_figure(view.found, title=f"{name}: how tokens spread over groups"), out / f"{stem}-sizes.png"
                )
            )
        written.append((name, view, files))
    place = atomic_write(out / PAGE, build_page(network, views))
    return Written(place, written)


def build_page(network: Network, views: Sequence[tuple[str, View]]) -> str:
    """The interactive page as HTML."""
    sections = []
    for index, (name, view) in enumerate(views):
        content = _answer(network, name, view)
        if view.found:
            content += page.card(explorer(view.picture, view.found, name))
            content += page.card(sizes_table(view.found), "Group sizes")
            tiles = "".join(block_tiles(view.picture, heads, name) for heads in pick_blocks(by_block(view.found)))
            content += page.card(
                f'<p class="lede small">{LEGEND}. The PNG files beside this page show every block.</p>{tiles}',
                "Groups that show most",
            )
        sections.append((f"image-{index + 1}", name, f'<div class="stack">{content}</div>'))
    if network.has_groups:
        text = _reading(network.model) + ("" if network.trained else UNTRAINED)
        sections.append(("reading", "How to read this", page.card(text)))
    kicker = (
        "trained network"
        if network.trained
        else "random weights: groups here reflect chance and the picture, nothing learned"
    )
    script = page.asset("explore.js") if network.has_groups else ""
    return page.page(
        f"Groups of {network.name}", _figures(views), sections, kicker=kicker, footer=page.FOOTER, script=script
    )


def summary(view: View) -> list[str]:
    """One line per block for the terminal: grid, groups, largest group, empty groups."""
    lines = []
    for heads in by_block(view.found):
        counts = np.stack([head.counts for head in heads])
        rows, columns = heads[0].grid
        lines.append(
            f"{heads[0].label:<20} {rows}×{columns} tokens, {len(heads)} heads × {heads[0].groups} groups, "
            f"{heads[0].selected.shape[1]} keys each; "
            f"largest group {counts.max()} tokens, {np.mean(counts == 0):.0%} empty"
        )
    return lines


def _figures(views: Sequence[tuple[str, View]]) -> list[tuple[str, str]]:
    blocks = by_block(views[0][1].found)
    figures = [("images", str(len(views)))]
    if blocks:
        counts = np.concatenate([head.counts for _, view in views for head in view.found])
        groups, keys = (
            sorted({head.groups for _, v in views for head in v.found}),
            max(h.selected.shape[1] for _, v in views for h in v.found),
        )
        figures += [
            ("blocks with groups", str(len(blocks))),
            ("groups a head", "–".join(str(g) for g in dict.fromkeys((groups[0], groups[-1])))),
            ("keys a group", f"≤ {keys}"),
            ("empty groups", f"{np.mean(counts == 0):.0%}"),
        ]
    return figures


def _answer(network: Network, name: str, view: View) -> str:
    """What the network says about the picture; for one without groups also the picture and why there is no more."""
    height, width = view.picture.shape[:2]
    sentence = f"Seen at {width}×{height} pixels."
    if network.trained and len(view.probabilities) == len(network.classes):
        order = np.argsort(-view.probabilities, kind="stable")[:3]
        answers = ", ".join(f"<b>{text(network.classes[i])}</b> {view.probabilities[i]:.1%}" for i in order)
        sentence += f" The network says: {answers}."
    drawn = ""
    if view.answer is not None:
        drawn = (
            f'<div class="answer">{page.picture(data_uri(view.answer), f"{name} with the answer", "the answer")}</div>'
        )
    if view.found:
        others = attention_modules(network.model)[1]
        if others:
            listed = ", ".join(f"{count} × {text(kind)}" for kind, count in others.most_common())
            sentence += f" Besides the blocks below it has {listed}, which form no dynamic groups."
        return page.lede(sentence) + drawn
    picture = page.picture(data_uri(Image.fromarray(view.picture)), name, pixelated=max(height, width) <= 64)
    return (
        page.note(explain_no_groups(network.model), warn=True)
        + page.lede(sentence)
        + (drawn or f'<div class="answer">{picture}</div>')
    )


DYNAMIC_GROUPS = """<p>In dynamic group attention each token's query joins the group whose centroid is nearest, by
content and not by place. Each group then chooses one set of keys from the whole image, by its centroid, and all its
members attend to exactly these. Every head has queries, keys and centroids of its own, so every head groups
differently.</p>"""
REGIONS = """<p>In bi-level routing attention a group is a region of the image. Each region chooses the few regions
whose mean key its mean query likes best, all heads together, and its tokens attend to all tokens of these.</p>"""
COLOURS = """<p>Point at the picture, tap it, or focus it and use the arrow keys. Blue: the tokens in the same group.
Orange: the keys the group chose.</p>"""
UNTRAINED = """<p>These weights are random. Train first (<code>coterie train</code>), then give the run folder instead
of <code>--model</code>.</p>"""


def _reading(model: nn.Module) -> str:
    routed = any(isinstance(module, BiLevelRoutingAttention) for module in model.modules())
    grouped = any(isinstance(module, MovingCentroids) for module in model.modules())
    return (DYNAMIC_GROUPS if grouped or not routed else "") + (REGIONS if routed else "") + COLOURS


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return atomic_write(path, buffer.getvalue())


def _stems(names: Sequence[str]) -> list[str]:
    """File names for the pictures: their own without the ending, made safe, numbered where two are the same."""
    stems: list[str] = []
    for name in names:
        stem = re.sub(r"[^\w.-]+", "-", Path(name).stem).strip("-.") or "image"
        stems.append(stem if stem not in stems else f"{stem}-{len(stems) + 1}")
    return stems
