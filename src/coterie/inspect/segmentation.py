"""The results part of a report on semantic segmentation: pixels confused, classes, and images from worst to best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from coterie.inspect import page
from coterie.inspect.charts import confusion_chart, short
from coterie.inspect.page import text
from coterie.inspect.results import MATRIX_CLASSES, PAIRS_SHOWN
from coterie.inspect.runs import LabelMaps
from coterie.inspect.showcase import Showcase

WORST, OTHERS = 6, 3


def class_figures(matrix: Int[np.ndarray, "classes classes"]) -> tuple[Float[np.ndarray, " classes"], ...]:
    """IoU, recall and precision of each class; NaN where a class neither occurs nor was said."""
    right, truly, said = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / (truly + said - right), right / truly, right / said


def image_scores(found: LabelMaps) -> Float[np.ndarray, " images"]:
    """Mean IoU of each image, over the classes that occur in it or were said of it."""
    right = np.diagonal(found.confusions, axis1=1, axis2=2)
    union = found.confusions.sum(axis=1) + found.confusions.sum(axis=2) - right
    overlap = np.divide(right, union, out=np.zeros(right.shape), where=union > 0)
    return overlap.sum(axis=1) / np.maximum((union > 0).sum(axis=1), 1)


def overview(found: LabelMaps) -> str:
    """The sentence about all test images."""
    matrix = found.confusion()
    overlap = class_figures(matrix)[0]
    share = np.diag(matrix).sum() / max(matrix.sum(), 1)
    known = int(np.isfinite(overlap).sum())
    return (
        f"{len(found.indices)} test images, {short(int(matrix.sum()))} labelled pixels: {share:.1%} are right; "
        f"mean IoU {np.nanmean(overlap) if known else 0:.1%} over {known} classes."
    )


def confusion_section(found: LabelMaps, classes: Sequence[str]) -> str:
    """Which classes' pixels are taken for which, as shares of the true class."""
    matrix = found.confusion()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    wrong = shares.copy()
    np.fill_diagonal(wrong, 0)
    order = [divmod(int(flat), len(classes)) for flat in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS_SHOWN]]
    rows = [
        [
            f"{text(classes[true])} → {text(classes[said])}",
            f"{wrong[true, said]:.1%}{page.meter(wrong[true, said], 'miss')}",
            short(int(matrix[true, said])),
        ]
        for true, said in order
        if wrong[true, said] > 0
    ]
    if not rows:
        return page.note("No pixel of the test images was misclassified.")
    chart = ""
    if len(classes) <= MATRIX_CLASSES:
        drawn = confusion_chart(matrix, classes, percent=True)
        chart = f'<div class="scroll" tabindex="0" role="region" aria-label="Confusion of pixels">{drawn}</div>'
        chart = page.card(chart + '<p class="muted small">Per cent of the pixels of the true class.</p>')
        rows = rows[:8]
    head = ["true → predicted", "share of the true class", "pixels"]
    listing = page.card(page.table(head, rows, "Most confused pairs of classes"), "Most confused pairs")
    return f'<div class="cards wide">{chart}{listing}</div>'


def classes_section(found: LabelMaps, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
    """IoU, recall and precision of each class, the weakest first."""
    matrix = found.confusion()
    overlap, recall, precision = class_figures(matrix)
    truly = matrix.sum(axis=1)
    images = (found.confusions.sum(axis=2) > 0).sum(axis=0)
    rows = []
    for index in np.argsort(np.where(np.isfinite(overlap), overlap, 2.0), kind="stable").tolist():
        rows.append(
            [
                f"{swatch(palette[index])}{text(classes[index])}",
                f"{share(overlap[index])}{page.meter(overlap[index])}",
                share(recall[index]),
                share(precision[index]),
                f"{truly[index] / max(truly.sum(), 1):.2%}",
                str(images[index]),
            ]
        )
    head = ["class", "IoU", "recall", "precision", "share of all pixels", "images"]
    absent = int((truly == 0).sum())
    remark = f" {absent} do not occur in the test images." if absent else ""
    lede = "Weakest first. IoU: pixels that are right, over those that are of the class or were said to be."
    return page.lede(lede + remark) + page.card(page.table(head, rows, "Figures of each class"))


def examples_section(found: LabelMaps, showcase: Showcase) -> str:
    """The worst images, typical ones and the best."""
    scores = image_scores(found)
    order = np.argsort(scores, kind="stable")
    worst = order[:WORST]
    rest = order[WORST:]
    best = rest[::-1][:OTHERS]
    middle = rest[: len(rest) - len(best)]
    start = max(len(middle) // 2 - OTHERS // 2, 0)

    def entries(rows: np.ndarray) -> list[tuple[int, str, str]]:
        return [_entry(found, int(row), float(scores[row])) for row in rows]

    parts = [
        showcase.gallery("Worst", entries(worst), "The images with the lowest mean IoU over their own classes."),
        showcase.gallery("Typical", entries(middle[start : start + OTHERS]), "From the middle of the order."),
        showcase.gallery("Best", entries(best)),
    ]
    return f'<div class="stack">{"".join(parts)}</div>'


def choose(found: LabelMaps, count: int) -> list[int]:
    """Numbers of test images worth a look: a good one, the worst one, then others."""
    order = np.argsort(-image_scores(found), kind="stable")
    chosen = list(dict.fromkeys([int(order[0]), int(order[-1]), *order.tolist()]))[:count]
    return [int(found.indices[row]) for row in chosen]


def _entry(found: LabelMaps, row: int, score: float) -> tuple[int, str, str]:
    matrix = found.confusions[row]
    right = np.diag(matrix).sum() / max(matrix.sum(), 1)
    index = int(found.indices[row])
    return index, f"test image {index}", f"mean IoU {score:.1%}, {right:.1%} of pixels right"


def swatch(colour: Sequence[int]) -> str:
    """A patch of a class's colour."""
    red, green, blue = (int(part) for part in colour)
    return f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>'


def share(value: float) -> str:
    """Per cent, or a dash for NaN."""
    return "–" if value != value else f"{value:.1%}"
