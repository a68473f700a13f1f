"""The pages in headless Chromium: they run without an error, draw their pictures, and fit a phone."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from inspect_networks import StripeNet
from inspect_runs import write_run
from PIL import Image

from coterie.inspect.explore import explore
from coterie.inspect.network import Network
from coterie.inspect.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# The page stands in a frame of a phone's width: a headless window does not go below 500 pixels.
FRAME = """<!doctype html><iframe id="f" width="{width}" height="800" srcdoc="{page}"></iframe><script>
const frame = document.getElementById("f");
frame.onload = () => setTimeout(() => {{
  const page = frame.contentDocument;
  const drawn = [...page.querySelectorAll(".stage > div:first-child canvas")].map(c => {{
    const pixels = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    return new Set(pixels.filter((_, i) => i % 4 === 2)).size;
  }});
  document.title = JSON.stringify({{
    width: page.documentElement.scrollWidth, drawn,
    heads: page.querySelectorAll(".strip button").length, info: page.querySelector(".info")?.textContent ?? "",
  }});
}}, 600);
</script>"""


def look_at(page: Path, width: int, folder: Path) -> dict:
    import json

    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text(), quote=True)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000", "--dump-dom",
               frame.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, f"the page did not come up: {done.stderr[-500:]}"
    return json.loads(html.unescape(title[1]))


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_fits(tmp_path: Path, width: int) -> None:
    names = [f"a class with quite a long name {n}" for n in range(12)]
    page = write_report(write_run(tmp_path / "run", classes=names))
    assert look_at(page, width, tmp_path)["width"] <= width


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_the_explorer_draws(tmp_path: Path, width: int) -> None:
    network = Network(StripeNet().eval(), "stripes", (32, 32), 3, (0.5,) * 3, (0.5,) * 3, list("abcde"), trained=True)
    written = explore(network, [("x.png", Image.new("RGB", (64, 32), "green"))], tmp_path)
    seen = look_at(written.page, width, tmp_path)
    assert seen["width"] <= width
    assert len(seen["drawn"]) == 1
    assert seen["drawn"][0] > 3  # paler, tinted, outlined and marked pixels
    assert seen["heads"] == 2
    assert "the token in row 5, column 9 is in group 0, with 32 of 128 tokens" in seen["info"]
