"""The frame of our HTML pages: one file, no request to anywhere, light and dark, wide and narrow.

Functions return strings of HTML. Text from outside (class names, paths, errors) always goes through `text`.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files

from coterie._version import __version__

FOOTER = f"Written by coterie {__version__}. The file needs nothing else and asks nothing of the network."
TALL_ROWS = 24  # a longer table scrolls inside its own box


def text(value: object) -> str:
    """`value` as text that is safe inside HTML and inside attributes."""
    return html.escape(str(value), quote=True)


def asset(name: str) -> str:
    """A file of this package that pages carry inside (style.css, explore.js)."""
    return files("coterie.inspect").joinpath(name).read_text(encoding="utf-8")


def page(
    title: str,
    figures: Sequence[tuple[str, str]],
    sections: Sequence[tuple[str, str, str]],
    *,
    kicker: str,
    footer: str,
    script: str = "",
) -> str:
    """A whole page.

    Args:
        title: the heading; kicker: the small line above it.
        figures: headline figures (name, value) for the sticky header, the first one stressed.
        sections: (id, heading, HTML) in order; they also make the navigation.
        footer: HTML. script: JavaScript to run at the end.
    """
    numbers = "".join(
        f"<div{' class=lead' if i == 0 else ''}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for i, (name, value) in enumerate(figures)
    )
    links = "".join(f'<a href="#{anchor}">{text(heading)}</a>' for anchor, heading, _ in sections)
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-h"><h2 id="{anchor}-h">{text(heading)}</h2>'
        f"{content}</section>\n"
        for anchor, heading, content in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="coterie {__version__}">
<title>{text(title)} · coterie</title>
<link rel="icon" href="data:,">
<style>
{asset("style.css")}</style>
</head>
<body>
<header><div class="wrap">
<div class="top">
<div class="brand"><small>{text(kicker)}</small><h1>{text(title)}</h1></div>
<dl class="figures">{numbers}</dl>
</div>
<nav aria-label="Sections">{links}</nav>
</div></header>
<main class="wrap">
{body}
<footer>{footer}</footer>
</main>
<script>
{asset("page.js")}{script}</script>
</body>
</html>
"""


def card(content: str, heading: str = "") -> str:
    """A framed box."""
    return f'<div class="card">{f"<h3>{text(heading)}</h3>" if heading else ""}{content}</div>'


def cards(contents: Iterable[str]) -> str:
    """Boxes side by side where there is room."""
    return f'<div class="cards">{"".join(contents)}</div>'


def lede(content: str) -> str:
    """The sentence under a heading (HTML)."""
    return f'<p class="lede">{content}</p>'


def note(message: str, warn: bool = False) -> str:
    """A remark, such as what is missing and how to get it."""
    return f'<p class="note{" warn" if warn else ""}">{text(message)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table that scrolls inside its own box; cells are HTML, `label` says what it is to a screen reader."""
    top = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    tall = " tall" if len(lines) > TALL_ROWS else ""
    content = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll{tall}" tabindex="0" role="region" aria-label="{text(label)}">{content}</div>'


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """A two-column table of names and values."""
    lines = "".join(f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows)
    return f'<table class="pairs"><tbody>{lines}</tbody></table>'


def meter(share: float, kind: str = "") -> str:
    """A thin bar, 0..1."""
    width = 100 * min(max(share, 0.0), 1.0) if share == share else 0.0
    return f'<span class="meter {kind}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'


def picture(uri: str, alt: str, caption: str = "", pixelated: bool = False) -> str:
    """An embedded image with its description and an optional caption (HTML)."""
    shown = f"<figcaption>{caption}</figcaption>" if caption else ""
    kind = " class=pixelated" if pixelated else ""
    return f'<figure><img src="{uri}" alt="{text(alt)}" loading="lazy"{kind}>{shown}</figure>'


def details(summary: str, content: str) -> str:
    """Content that opens on a click."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"
