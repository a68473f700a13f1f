"""How much more compute does the baseline need for the same loss? From finished language-modelling runs.

    python benchmarks/compute_curve.py runs/shakespeare-* --baseline llama --output docs/images/compute.webp

A run counts with its last loss on the test split and its training FLOPs (FLOPs per token, as the run logged them, times
tokens). Runs that differ in nothing but their seed are averaged. Between the baseline's points, the logarithm of
compute is linear in the loss; beyond them the line through the nearest two goes on, and the figure is marked with *.
The table, as Markdown, goes to standard output.
"""

import argparse
import itertools
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from coterie.engine import load_config
from coterie.engine.logs import read_events


@dataclass(frozen=True)
class Point:
    """Runs of one configuration: name, parameters, training FLOPs, loss of each seed."""

    name: str
    parameters: int
    flops: float
    losses: tuple[float, ...]
    bits_per_byte: float

    @property
    def loss(self) -> float:
        return mean(self.losses)


def read_points(folders: list[Path]) -> list[Point]:
    """The finished runs, seeds joined.

    Raises:
        ValueError: a folder without the end of a language-modelling run, or runs of different data.
    """
    found = defaultdict(list)
    data = set()
    for folder in folders:
        config, events = load_config(folder / "config.yaml"), list(read_events(folder))
        sizes = [event for event in events if event["event"] == "model"]
        done = [event for event in events if event["event"] in ("eval", "test") and event.get("split") == "test"]
        if not sizes or not done:
            raise ValueError(f"{folder}: not a finished run of a language model (no model or no test in its log)")
        data.add((config.data.source, str(config.text)))
        options = {k: v for k, v in config.model.options.items() if k.startswith(("composition", "static"))}
        name = config.model.name + "".join(f" {k}={v}" for k, v in sorted(options.items()))
        tokens = done[-1]["step"] * config.train.batch_size * config.text.sequence_length
        key = name, sizes[0]["parameters"], sizes[0]["flops_per_token"] * tokens
        found[key].append((done[-1]["loss"], done[-1]["bits_per_byte"]))
    if len(data) > 1:
        raise ValueError(f"runs of different data or tokenizers cannot be compared: {sorted(data)}")
    points = [
        Point(*key, losses=tuple(loss for loss, _ in ends), bits_per_byte=mean(bits for _, bits in ends))
        for key, ends in found.items()
    ]
    return sorted(points, key=lambda point: (point.name, point.flops))


def compute_for(loss: float, baseline: list[Point]) -> tuple[float, bool]:
    """FLOPs at which the baseline has the loss, and whether that lies beyond its points. Takes two points at least."""
    points = sorted(baseline, key=lambda point: point.flops)
    pairs = list(itertools.pairwise(points))
    inside = [(a, b) for a, b in pairs if b.loss <= loss <= a.loss]
    a, b = inside[0] if inside else pairs[0] if loss > points[0].loss else pairs[-1]
    if a.loss == b.loss:
        return math.nan, True
    share = (a.loss - loss) / (a.loss - b.loss)
    return math.exp(math.log(a.flops) + share * (math.log(b.flops) - math.log(a.flops))), not inside


def table(points: list[Point], baseline: str) -> str:
    """Markdown, a row for each point."""
    reference = [point for point in points if point.name == baseline]
    rows = [
        "| model | parameters | training FLOPs | loss (nats/token), by seed | mean | bits per byte | "
        f"compute of {baseline} for that loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in points:
        factor = "" if point in reference else "-"
        if point not in reference and len(reference) > 1:
            flops, beyond = compute_for(point.loss, reference)
            factor = f"{flops / point.flops:.2f}×{'*' if beyond else ''}"
        losses = ", ".join(f"{loss:.3f}" for loss in point.losses)
        rows.append(
            f"| {point.name} | {point.parameters:,} | {point.flops:.2e} | {losses} | {point.loss:.3f} | "
            f"{point.bits_per_byte:.3f} | {factor} |"
        )
    return "\n".join(rows)


def draw(points: list[Point], path: Path) -> None:
    """Loss over compute, a line for each model; seeds as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(point.name for point in points):
        line = [point for point in points if point.name == name]
        (drawn,) = axes.plot([p.flops for p in line], [p.loss for p in line], "-", label=name)
        for point in line:
            axes.plot([point.flops] * len(point.losses), point.losses, ".", color=drawn.get_color())
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="test loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--baseline", default="llama", help="name of the model that the others are compared with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a picture of loss over compute")
    args = parser.parse_args()
    try:
        points = read_points(args.runs)
    except (ValueError, OSError) as error:
        print(f"compute_curve: error: {error}", file=sys.stderr)
        return 2
    print(table(points, args.baseline))
    if args.output:
        draw(points, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
