"""Small pictures of groups: the image with a group's tokens tinted blue and the keys it chose marked with orange dots.

Everything is numpy and Pillow: (height, width, 3) uint8 arrays in, arrays out. A token is a cell of the grid laid over
the image; tiles are drawn at `side` pixels on the long edge, so that a digit of 8x8 pixels and a photograph look alike.
"""

from __future__ import annotations

import base64
import colorsys
import io

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from coterie.inspect.groups import StageGroups

MEMBER = (64, 126, 255)
KEY = (255, 138, 20)
INK = (16, 20, 28)


def to_picture(
    image: Float[Tensor, "channels height width"], mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Undo the normalisation: what the network saw, as (height, width, 3) uint8. One channel becomes grey.

    With other than 1 or 3 channels the first one is shown.
    """
    values = image.detach().float().cpu().numpy()
    channels = values.shape[0]
    mean_, std_ = (np.resize(np.asarray(v, dtype=np.float32), channels)[:, None, None] for v in (mean, std))
    values = np.clip(values * std_ + mean_, 0, 1)
    if channels != 3:
        values = np.repeat(values[:1], 3, axis=0)
    return (values.transpose(1, 2, 0) * 255 + 0.5).astype(np.uint8)


def enlarge(picture: np.ndarray, side: int) -> np.ndarray:
    """The picture with its long edge at `side` pixels; tiny pictures keep their pixels visible."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    method = Image.Resampling.NEAREST if max(height, width) <= 64 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize(size, method))


def cell_of_pixel(grid: tuple[int, int], height: int, width: int) -> np.ndarray:
    """(height, width) int: the cell (row-major) that each pixel belongs to."""
    rows = np.arange(height) * grid[0] // height
    columns = np.arange(width) * grid[1] // width
    return rows[:, None] * grid[1] + columns[None, :]


def draw_group(picture: np.ndarray, head: StageGroups, group: int, side: int = 224) -> np.ndarray:
    """One group: its members tinted and outlined, the rest of the image pale and grey, the chosen keys as dots.

    Where every token is a key there are no dots.
    """
    base = enlarge(picture, side).astype(np.float32)
    height, width = base.shape[:2]
    cell = cell_of_pixel(head.grid, height, width)
    inside = np.isin(cell, head.members(group))
    grey = base.mean(axis=2, keepdims=True)
    out = np.where(inside[..., None], 0.52 * base + 0.48 * np.array(MEMBER), 0.42 * grey + 0.58 * 236).astype(np.uint8)
    out[_outline(inside)] = (24, 62, 160)
    return out if head.attends_to_all else _mark_keys(out, head.keys(group), head.grid)


def draw_all_groups(picture: np.ndarray, head: StageGroups, side: int = 224) -> np.ndarray:
    """All groups of a head at once: each token in its group's colour, over the light and shade of the image."""
    base = enlarge(picture, side).astype(np.float32)
    height, width = base.shape[:2]
    cell = cell_of_pixel(head.grid, height, width)
    owner = head.assignment[head.prefix :][cell]
    colour = group_colours(head.groups)[np.clip(owner, 0, None)]
    shade = 0.45 + 0.55 * base.mean(axis=2, keepdims=True) / 255
    return np.where(owner[..., None] >= 0, colour * shade * 0.8 + base * 0.2, base).clip(0, 255).astype(np.uint8)


def group_colours(groups: int) -> np.ndarray:
    """(groups, 3) float 0..255: neighbours in number far apart in hue; three lightnesses, so that 48 stay distinct."""
    colours = []
    for index in range(groups):
        hue = (index * 0.61803398875) % 1.0
        colours.append(colorsys.hls_to_rgb(hue, (0.58, 0.72, 0.46)[index % 3], 0.72))
    return np.array(colours, dtype=np.float32).reshape(-1, 3) * 255


def data_uri(picture: np.ndarray | Image.Image) -> str:
    """The picture as a data: address: PNG when it is small, WebP otherwise."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= 64 else "webp"
    image.save(buffer, kind.upper(), **({"optimize": True} if kind == "png" else {"quality": 88, "method": 4}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _outline(inside: np.ndarray) -> np.ndarray:
    """Pixels of `inside` that touch a pixel outside (the picture's own border does not count)."""
    padded = np.pad(inside, 1, mode="edge")
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return inside & ~core


def _mark_keys(picture: np.ndarray, keys: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Dots at the keys. Drawn at three times the size and reduced, for smooth edges."""
    height, width = picture.shape[:2]
    zoom = 3
    layer = Image.new("RGBA", (width * zoom, height * zoom), (0, 0, 0, 0))
    pen = ImageDraw.Draw(layer)
    step_y, step_x = height / grid[0], width / grid[1]
    radius = min(max(min(step_x, step_y) * 0.3, 2.0), 7.0) * zoom
    for key in keys:
        row, column = divmod(int(key), grid[1])
        x, y = (column + 0.5) * step_x * zoom, (row + 0.5) * step_y * zoom
        pen.ellipse([x - radius - 2, y - radius - 2, x + radius + 2, y + radius + 2], fill=(*INK, 255))
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(*KEY, 255))
    layer = layer.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(Image.alpha_composite(Image.fromarray(picture).convert("RGBA"), layer).convert("RGB"))
