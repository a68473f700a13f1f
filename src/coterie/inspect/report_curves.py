"""The curves part of a report: what was logged over the steps of training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coterie.inspect import page
from coterie.inspect.charts import Series, line_chart, smooth
from coterie.inspect.runs import Run

SIZES = ("_small", "_medium", "_large")
NAMES = {
    "miou": "mean IoU", "ap": "box AP", "ap50": "box AP50", "ap75": "box AP75", "mask_ap": "mask AP",
    "mask_ap50": "mask AP50", "mask_ap75": "mask AP75",
    "ap_small": "small objects", "ap_medium": "medium objects", "ap_large": "large objects",
    "mask_ap_small": "small objects", "mask_ap_medium": "medium objects", "mask_ap_large": "large objects",
}  # fmt: skip


def curves_section(run: Run, shares: Sequence[str], *, per_step: float = 1, x_label: str = "step") -> str:
    """Loss, the figures among `shares` in one chart, learning rate, speed, gradient, and whatever else was logged.

    Args:
        run: The run.
        shares: Names of figures.
        per_step, x_label: What the axis counts, and how much of it a step is.
    """
    train, evals = run.train, run.evals
    cards = []

    def column(events: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
        have = [
            (e.get("step", i) * per_step, e[key]) for i, e in enumerate(events) if isinstance(e.get(key), int | float)
        ]
        return [x for x, _ in have], [y for _, y in have]

    def lines(keys: Sequence[str], style: int = 0) -> list[Series]:
        return [
            Series(pretty(key), *column(evals, key), style=(style + i) % 4, points=True)
            for i, key in enumerate(keys)
            if column(evals, key)[0]
        ]

    steps, losses = column(train, "loss")
    loss_lines = (
        [Series("raw", steps, losses, faint=True), Series("training (smoothed)", steps, list(smooth(losses)))]
        if steps
        else []
    )
    keys = sorted({key for e in evals for key, value in e.items() if is_number(value)} - {"step", "epoch"})
    for line in lines([k for k in keys if "loss" in k], style=1):
        line.name = run.monitored if line.name == "loss" else line.name
        loss_lines.append(line)
    if loss_lines:
        finite = [y for line in loss_lines for y in line.y if math.isfinite(y) and y > 0]
        log = bool(finite) and max(finite) / min(finite) > 50
        title = "Loss" + (" (logarithmic)" if log else "")
        cards.append(
            page.card(
                line_chart(loss_lines, x_label=x_label, describe="Loss over the steps of training", log=log), title
            )
        )
    shown = [key for key in shares if key in keys]
    averaged = ", of the averaged weights" if run.setting("optim.ema_decay") else ""
    if shown:
        what = _sentence(pretty(shown[0]))
        cards.append(
            page.card(
                line_chart(
                    lines(shown[:4]),
                    x_label=x_label,
                    describe=f"{what} on the {run.monitored} split over the steps of training",
                    percent=True,
                ),
                f"{what} on the {run.monitored} split{averaged}",
            )
        )
    rates = column(train, "lr")
    if rates[0]:
        cards.append(
            page.card(
                line_chart(
                    [Series("learning rate", *rates)],
                    x_label=x_label,
                    describe="Learning rate over the steps of training",
                ),
                "Learning rate",
            )
        )
    for unit in ("images", "tokens"):
        speed = column(train, f"{unit}_per_s")
        if speed[0]:
            cards.append(
                page.card(
                    line_chart(
                        [Series(f"{unit}/s", *speed)], x_label=x_label, describe="Training speed over the steps"
                    ),
                    f"Speed, {unit} per second",
                )
            )
    norms = column(train, "grad_norm")
    if norms[0]:
        norm_lines = [Series("raw", *norms, faint=True), Series("norm (smoothed)", norms[0], list(smooth(norms[1])))]
        cards.append(
            page.card(
                line_chart(
                    norm_lines, x_label=x_label, describe="Norm of the gradient before clipping, over the steps"
                ),
                "Gradient norm before clipping",
            )
        )
    by_size = [key for key in keys if key.endswith(SIZES)]
    for kind in ("ap", "mask_ap"):
        if found := [f"{kind}{size}" for size in SIZES if f"{kind}{size}" in by_size]:
            heading = f"{_sentence(pretty(kind))} by the size of the objects"
            drawn = line_chart(lines(found), x_label=x_label, describe=f"{heading}, over the steps", percent=True)
            cards.append(page.card(drawn, heading))
    known = {*shares, *by_size, "ap50", "ap75", "mask_ap50", "mask_ap75"}
    others = [k for k in keys if "loss" not in k and k not in known and not k.endswith(("seconds", "_s", "samples"))]
    for key in others[:4]:
        cards.append(
            page.card(
                line_chart(lines([key]), x_label=x_label, describe=f"{pretty(key)} over the steps"),
                _sentence(pretty(key)),
            )
        )
    return page.cards(cards) if cards else page.note("The log holds no figures to draw.")


def training_seconds(run: Run) -> float:
    """Time spent in training steps, evaluations aside: from the logged speeds, so that breaks do not count."""
    size, seconds, before = run.setting("train.batch_size"), 0.0, 0.0
    for event in run.train:
        step, speed = event.get("step"), event.get("images_per_s")
        if speed is None and is_number(event.get("tokens_per_s")):
            speed = event["tokens_per_s"] / run.setting("text.sequence_length", 1)
        if isinstance(step, int | float) and is_number(step):
            if is_number(size) and isinstance(speed, int | float) and speed > 0:
                seconds += (step - before) * size / speed
            before = step
    return seconds


def is_number(value: object) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def pretty(key: str) -> str:
    """The name of a figure, for people."""
    return NAMES.get(key, key.replace("_", " "))


def _sentence(name: str) -> str:
    return name[0].upper() + name[1:]
