"""Checks of an HTML page that need no browser."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "link", "img", "input", "br", "hr"}
SHAPES = {"rect", "line", "path", "circle"}  # of SVG: these may close themselves


class _Structure(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.problems: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(str(values["id"]))
        if tag == "img":
            self.images.append(values)
        self.addresses += [
            str(values[name]) for name in ("src", "href", "srcset", "action", "data") if values.get(name)
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in SHAPES:
            self.problems.append(f"<{tag}/> closes itself")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()


def check_page(page: str) -> int:
    """The page is whole, asks nothing of the network, its pictures decode and have descriptions. Returns how many."""
    parser = _Structure()
    parser.feed(page)
    parser.close()
    assert parser.problems == []
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    assert all(address.startswith(("data:", "#")) for address in parser.addresses)
    assert {a[1:] for a in parser.addresses if a.startswith("#")} <= set(parser.ids)
    assert not re.search(r"url\(|@import|https?://|//cdn", page)
    for image in parser.images:
        assert image["alt"], "a picture without a description"
        Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition("base64,")[2]))).load()
    return len(parser.images)
