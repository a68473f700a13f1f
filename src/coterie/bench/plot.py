"""The picture beside the table: bars for shapes and models, log-log lines for scaling. matplotlib is loaded when a
picture is drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.bench.console import number, seconds
from coterie.bench.record import case_label
from coterie.engine.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BASELINE = "#6b7280"
_COLOURS = ("#0f766e", "#c2410c", "#4338ca", "#a16207", "#be185d", "#0369a1")


def save_plot(report: dict[str, Any], path: str | Path) -> Path | None:
    """Draw `report` as a PNG at `path`; returns None where nothing was timed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = draw(report)
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    return atomic_write(path, buffer.getvalue())


def draw(report: dict[str, Any]) -> Figure | None:
    """The figure of a report, or None where nothing was timed."""
    if not any("seconds" in entry for result in report["results"] for entry in result["contenders"]):
        return None
    figure = _draw_scaling(report) if report["kind"] == "scaling" else _draw_bars(report)
    found = report["conditions"]
    first = report["results"][0]
    note = (
        f"{found['device_name']}, {found['threads']} threads, {first['case']['dtype']}, "
        f"torch {found['versions']['torch']}, {found['date'][:10]}. Bars and points: median; whiskers: quartiles."
    )
    figure.text(0.01, 0.05 / figure.get_figheight(), note, fontsize=7, color=_BASELINE)  # inches from below
    return figure


def _names(report: dict[str, Any]) -> list[str]:
    """All contenders, the baseline first, so that it keeps its colour in every picture."""
    names = dict.fromkeys(e["name"] for result in report["results"] for e in result["contenders"] if "seconds" in e)
    return sorted(names, key=lambda name: name != report["baseline"])


def _colours(report: dict[str, Any]) -> dict[str, str]:
    others = [name for name in _names(report) if name != report["baseline"]]
    return {report["baseline"]: _BASELINE} | {n: _COLOURS[i % len(_COLOURS)] for i, n in enumerate(others)}


def _draw_bars(report: dict[str, Any]) -> Figure:
    """One panel per result: a bar per contender with its quartiles, its ratio to the baseline written beside it."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    results = [result for result in report["results"] if any("seconds" in e for e in result["contenders"])]
    heights = [0.5 + 0.42 * len(result["contenders"]) for result in results]
    height = sum(heights) + 0.55 * len(results) + 0.5
    figure = Figure(figsize=(8, height), layout=ConstrainedLayoutEngine(rect=(0, 0.2 / height, 1, 1 - 0.2 / height)))
    panels = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights)[:, 0]
    colours = _colours(report)
    if len(colours) > len(_COLOURS) + 1:  # too many to tell apart, and each bar has its name
        colours = {name: _BASELINE if name == report["baseline"] else _COLOURS[0] for name in colours}
    for axes, result in zip(panels, results, strict=True):
        entries = [entry for entry in result["contenders"] if "seconds" in entry][::-1]
        for y, entry in enumerate(entries):
            figures = entry["seconds"]
            median = figures["median"] * 1e3
            whiskers = [[median - figures["quartile_1"] * 1e3], [figures["quartile_3"] * 1e3 - median]]
            axes.barh(y, median, xerr=whiskers, color=colours[entry["name"]], height=0.7, error_kw={"linewidth": 1})
            label = f"  {seconds(figures['median'])}, {number(entry['ratio'], 'x')}"
            axes.text(figures["quartile_3"] * 1e3, y, label, va="center", fontsize=8)
        axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries], fontsize=8)
        axes.set_title(case_label(result), fontsize=9, loc="left")
        axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
        axes.tick_params(axis="x", labelsize=8)
        _quiet(axes)
    panels[-1].set_xlabel(f"ms per call (x: times faster than {report['baseline']})", fontsize=8)
    return figure


def _draw_scaling(report: dict[str, Any]) -> Figure:
    """Time and memory over tokens, both axes logarithmic; extrapolated times are hollow and dashed."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, 4.4), layout=ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95)))
    time_axes, memory_axes = figure.subplots(1, 2)
    for name, colour in _colours(report).items():
        entries = [(r["case"]["tokens"], e) for r in report["results"] for e in r["contenders"] if e["name"] == name]
        timed = [(tokens, e["seconds"]) for tokens, e in entries if "seconds" in e and not e.get("extrapolated")]
        guessed = [(tokens, e["seconds"]) for tokens, e in entries if e.get("extrapolated")]
        if timed:
            middle = [figures["median"] for _, figures in timed]
            low = [figures["median"] - figures["quartile_1"] for _, figures in timed]
            high = [figures["quartile_3"] - figures["median"] for _, figures in timed]
            time_axes.errorbar(
                [t for t, _ in timed], middle, yerr=[low, high], color=colour, marker="o", ms=4, label=name
            )
        if guessed:
            line = [*timed[-1:], *guessed]
            points = [t for t, _ in line], [figures["median"] for _, figures in line]
            time_axes.plot(
                *points, color=colour, linestyle=":", marker="o", ms=4, mfc="white", label=f"{name}, extrapolated"
            )
        weighed = [
            (tokens, e["memory"]["peak_extra_bytes"])
            for tokens, e in entries
            if e.get("memory", {}).get("peak_extra_bytes")
        ]
        if weighed:
            memory_axes.plot(*zip(*[(t, b / 2**20) for t, b in weighed]), color=colour, marker="o", ms=4, label=name)
    unit = [(r["case"]["tokens"], r["tensor_bytes"] / 2**20) for r in report["results"]]
    memory_axes.plot(*zip(*unit), color="#9ca3af", linestyle="--", linewidth=1, label="query, key, value and output")
    for axes, title, label in ((time_axes, "time", "seconds per call"), (memory_axes, "peak extra memory", "MiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([r["case"]["tokens"] for r in report["results"]])
        axes.set_xticklabels(
            [f"{r['case']['tokens']:,}" for r in report["results"]], rotation=40, ha="right", fontsize=8
        )
        axes.minorticks_off()
        axes.set_xlabel("tokens", fontsize=9)
        axes.set_ylabel(label, fontsize=9)
        axes.set_title(f"{report['subject']}, {report['results'][0]['direction']}: {title}", fontsize=10, loc="left")
        axes.legend(fontsize=7, frameon=False)
        axes.grid(True, which="major", color="#e5e7eb", linewidth=0.6)
        _quiet(axes)
    return figure


def _quiet(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
