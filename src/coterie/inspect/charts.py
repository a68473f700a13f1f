"""Charts as inline SVG. Colours are CSS variables, so the same chart is right in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coterie.inspect.page import text


@dataclass
class Series:
    """One line: `style` 0..3 picks the colour; `faint` draws it thin and pale and leaves it out of the legend."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    style: int = 0
    faint: bool = False
    points: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    describe: str,
    percent: bool = False,
    log: bool = False,
    unit: bool = False,
) -> str:
    """Lines over x. Values that are not finite are left out; with none left, a note stands in the chart's place.

    Args:
        describe: what the chart shows, for those who cannot see it.
        percent: y is a share and labelled in per cent. log: logarithmic y (non-positive values are left out).
        unit: both axes go from 0 to 1, and the legend leaves out the last value, which says nothing there.
    """
    clean = []
    for line in series:
        x, y = np.asarray(line.x, dtype=float), np.asarray(line.y, dtype=float)
        keep = np.isfinite(x) & np.isfinite(y) & ((y > 0) if log else True)
        if keep.any():
            clean.append((line, *_thin(x[keep], y[keep])))
    if not clean:
        return '<p class="note">No finite values were logged.</p>'
    width, height, left, right, top, bottom = 440.0, 250.0, 50.0, 14.0, 10.0, 36.0
    x_low, x_high = min(x.min() for _, x, _ in clean), max(x.max() for _, x, _ in clean)
    if x_high == x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    ticks = _y_ticks(clean, percent, log)
    if unit:
        (x_low, x_high), ticks = (0.0, 1.0), [0.0, 0.25, 0.5, 0.75, 1.0]
    scale = math.log10 if log else float
    y_low, y_high = scale(ticks[0]), scale(ticks[-1])

    def px(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def py(value: float) -> float:
        return top + (1 - (scale(value) - y_low) / (y_high - y_low)) * (height - top - bottom)

    parts = []
    label = _percent if percent else short
    for tick in ticks:
        parts.append(
            f'<line class="gridline" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
        )
        parts.append(f'<text x="{left - 7}" y="{py(tick) + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in _ticks(x_low, x_high, 5):
        if x_low - 1e-9 <= tick <= x_high + 1e-9:
            parts.append(
                f'<text x="{px(tick):.1f}" y="{height - bottom + 16}" text-anchor="middle">{short(tick)}</text>'
            )
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    parts.append(f'<text x="{width - right}" y="{height - 4}" text-anchor="end">{text(x_label)}</text>')
    for line, x, y in clean:
        path = "M" + "L".join(f"{px(a):.1f} {py(b):.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<g class="s{line.style}"><path class="{"faint" if line.faint else "line"}" d="{path}"/>')
        if not line.faint and (line.points or len(x) == 1) and len(x) <= 60:
            parts += [
                f'<circle class="dot" cx="{px(a):.1f}" cy="{py(b):.1f}" r="2.6">'
                f"<title>{text(line.name)}: {label(b)} at {text(x_label)} {short(a)}</title></circle>"
                for a, b in zip(x, y, strict=True)
            ]
        parts.append("</g>")
    named = [(line, y) for line, _, y in clean if not line.faint]

    def latest(value: float) -> str:
        return f' <b class="strong">{label(value)}</b>'

    legend = "".join(
        f'<li class="s{line.style}">{text(line.name)}{"" if unit else latest(y[-1])}</li>' for line, y in named
    )
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text(describe)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul>'
    )


def bar_chart(values: Sequence[float], *, x_label: str, y_label: str, describe: str, rule: float | None = None) -> str:
    """Bars side by side, with an optional horizontal rule (a mean, an even split)."""
    heights = np.nan_to_num(np.asarray(values, dtype=float))
    if not len(heights):
        return '<p class="note">Nothing to draw.</p>'
    width, height, left, right, top, bottom = 440.0, 190.0, 44.0, 8.0, 10.0, 34.0
    ticks = _ticks(0, max(float(heights.max()), rule or 0.0, 1e-9), 4)
    step = (width - left - right) / len(heights)

    def py(value: float) -> float:
        return top + (1 - value / ticks[-1]) * (height - top - bottom)

    parts = []
    for tick in ticks:
        parts.append(
            f'<line class="gridline" x1="{left}" x2="{width - right}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
        )
        parts.append(f'<text x="{left - 7}" y="{py(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    gap = min(step * 0.16, 2.0)
    parts.append('<g class="s0">')
    for index, value in enumerate(heights):
        parts.append(
            f'<rect class="bar" x="{left + index * step + gap / 2:.1f}" y="{py(value):.1f}" width="{step - gap:.1f}" '
            f'height="{height - bottom - py(value):.1f}"><title>{index + 1}: {short(value)}</title></rect>'
        )
    parts.append("</g>")
    if rule is not None:
        parts.append(
            f'<g class="s1"><line style="stroke:var(--c)" stroke-width="1.4" stroke-dasharray="4 3" '
            f'x1="{left}" x2="{width - right}" y1="{py(rule):.1f}" y2="{py(rule):.1f}"/></g>'
        )
    parts.append(f'<text x="{width - right}" y="{height - 8}" text-anchor="end">{text(x_label)}</text>')
    parts.append(f'<text x="{left}" y="{height - 8}">{text(y_label)}</text>')
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text(describe)}">{"".join(parts)}</svg>'


def confusion_chart(matrix: np.ndarray, classes: Sequence[str], *, percent: bool = False) -> str:
    """Rows are true classes, columns predicted ones; the colour is the share of the row, the number the count.

    With `percent` the number is the share, in per cent, and shares below half of one have none.
    """
    count = len(classes)
    names = [clip(name, 14) for name in classes]
    cell = 34.0 if count <= 12 else 28.0
    left = max(14 + 6.6 * max(len(n) for n in names), 44.0)
    slanted = max(len(n) for n in names) > 3
    top = 30 + (4.9 * max(len(n) for n in names) if slanted else 8)
    width, height = left + count * cell + (30 if slanted else 6), top + count * cell + 6
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    parts = [
        f'<text x="{left}" y="13">predicted →</text>',
        f'<text x="{left - 8:.0f}" y="{top - 8:.0f}" text-anchor="end">true ↓</text>',
    ]
    for index, name in enumerate(names):
        middle = index * cell + cell / 2
        parts.append(
            f'<text class="strong" x="{left - 8:.1f}" y="{top + middle + 4:.1f}" text-anchor="end">{text(name)}</text>'
        )
        if slanted:
            parts.append(
                f'<text class="strong" transform="translate({left + middle - 2:.1f} {top - 7:.1f}) rotate(-40)">'
                f"{text(name)}</text>"
            )
        else:
            parts.append(
                f'<text class="strong" x="{left + middle:.1f}" y="{top - 8:.1f}" text-anchor="middle">'
                f"{text(name)}</text>"
            )
    for row in range(count):
        for column in range(count):
            value, part = int(matrix[row, column]), float(share[row, column])
            x, y = left + column * cell, top + row * cell
            right = row == column
            # Errors are rare in a good network: the square root keeps one in a hundred visible.
            strength = (0.08 + 0.87 * part) if right else min(1.0, 0.12 + 0.9 * math.sqrt(part))
            fill = "var(--raised)" if value == 0 else f"rgba(var(--{'heat' if right else 'miss'}),{strength:.2f})"
            parts.append(
                f'<g><rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell - 2:.1f}" height="{cell - 2:.1f}" rx="3" '
                f'style="fill:{fill}"/><title>true {text(classes[row])}, predicted {text(classes[column])}: '
                f"{value} ({part:.1%} of the class)</title>"
            )
            if value and not (percent and part < 0.005):
                tone = "on" if right and part > 0.5 else "strong"
                shown = f"{100 * part:.0f}" if percent else str(value)
                size = "" if len(shown) < 4 else ' font-size="9.5"'
                parts.append(
                    f'<text class="{tone}" x="{x + cell / 2:.1f}" y="{y + cell / 2 + 4:.1f}" text-anchor="middle"'
                    f"{size}>{shown}</text>"
                )
            parts.append("</g>")
    errors = int(matrix.sum() - np.trace(matrix))
    label = f"Confusion matrix of {count} classes: {int(np.trace(matrix))} right, {errors} wrong"
    sides = f"max-width:{width * 1.15:.0f}px;min-width:{min(width, 620) * 0.85:.0f}px;margin:0 auto"
    size = f"0 0 {width:.0f} {height:.0f}"
    head = f'<svg viewBox="{size}" style="{sides}" role="img" aria-label="{label}">'
    return f"{head}{''.join(parts)}</svg>"


def short(value: float) -> str:
    """A number in few characters: 0.00012 -> 1.2e-4, 12000 -> 12k."""
    value = float(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 1e-3:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def clip(name: str, length: int) -> str:
    """`name` cut to `length` characters, with an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + "…"


def smooth(values: Sequence[float]) -> np.ndarray:
    """Exponential moving average over a twentieth of the curve, the start corrected as in Adam; NaN is skipped."""
    weight = 1 - 1 / max(len(values) / 20, 1.0)
    out, mean, mass = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        out.append(mean / mass if mass else math.nan)
    return np.array(out)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def _thin(x: np.ndarray, y: np.ndarray, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points: of each bucket its lowest and its highest, so that spikes stay."""
    if len(x) <= most:
        return x, y
    keep = {0, len(x) - 1}
    for bucket in np.array_split(np.arange(len(x)), most // 2):
        keep |= {int(bucket[y[bucket].argmin()]), int(bucket[y[bucket].argmax()])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    raw = (high - low) / max(count, 1)
    unit = 10 ** math.floor(math.log10(raw))
    step = unit * next(m for m in (1, 2, 2.5, 5, 10) if raw <= m * unit * (1 + 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def _y_ticks(clean: list, percent: bool, log: bool) -> list[float]:
    values = np.concatenate([y for line, _, y in clean if not line.faint] or [y for _, _, y in clean])
    faint = [y for line, _, y in clean if line.faint]
    low, high = float(values.min()), float(values.max())
    if faint:  # a few spikes of the raw curve must not flatten everything: they may leave the top by a little
        raw = np.concatenate(faint)
        low, high = min(low, float(raw.min())), max(high, float(np.percentile(raw, 99.5)))
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [10.0**e for e in range(first, max(last, first + 1) + 1)]
    ticks = _ticks(low, high, 4)
    if percent:
        ticks = [t for t in ticks if t <= 1 + 1e-9] if high <= 1 else ticks
        ticks = ticks if len(ticks) > 1 and ticks[-1] >= high else _ticks(low, max(high, low + 1e-3), 4)
    return ticks
