"""The results part of a report: confusion matrix, classes, and the examples that say most. HTML from predictions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from coterie.data.images import BadSample
from coterie.inspect import page
from coterie.inspect.charts import confusion_chart
from coterie.inspect.page import text
from coterie.inspect.runs import Predictions
from coterie.inspect.tiles import data_uri

logger = logging.getLogger("coterie.inspect")

MATRIX_CLASSES = 20  # above this the numbers in the cells cannot be read any more
PAIRS_SHOWN = 20
ROWS_SHOWN = 60
EXAMPLES = 12
PICTURE_SIDE = 256


def confusion_section(found: Predictions, classes: Sequence[str]) -> str:
    """The confusion matrix; with many classes the pairs that are confused most; with one class a remark."""
    if len(classes) == 1:
        return page.note("There is one class only, so nothing can be confused with anything.")
    matrix = found.confusion()
    pairs = _confused_pairs(matrix)
    chart = ""
    if len(classes) <= MATRIX_CLASSES:
        drawn = confusion_chart(matrix, classes)
        chart = f'<div class="scroll" tabindex="0" role="region" aria-label="Confusion matrix">{drawn}</div>'
        chart = page.card(
            chart
            + '<p class="muted small">Blue: right, by share of the class. Orange: errors, drawn stronger than their '
            "share so that rare ones show.</p>"
        )
    if not pairs:
        return chart + page.note("No test sample was misclassified.")
    totals = matrix.sum(axis=1)
    rows = [
        [
            f"{text(classes[true])} → {text(classes[said])}",
            str(count),
            f"{count / totals[true]:.1%}{page.meter(count / totals[true], 'miss')}",
        ]
        for count, true, said in pairs[: 8 if chart else PAIRS_SHOWN]
    ]
    listing = page.card(
        page.table(["true → predicted", "samples", "share of the true class"], rows, "Most confused pairs"),
        "Most confused pairs",
    )
    if not chart:
        return (
            page.lede(f"{len(classes)} classes: the {len(rows)} pairs that are confused most, of {len(pairs)}.")
            + listing
        )
    return f'<div class="cards wide">{chart}{listing}</div>'


def classes_section(found: Predictions, classes: Sequence[str]) -> str:
    """Precision, recall and F1 of each class, the weakest first."""
    matrix = found.confusion()
    right, truly, said = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        recall, precision = right / truly, right / said
        f1 = 2 * right / (truly + said)
    order = np.lexsort((np.arange(len(classes)), np.where(truly > 0, recall, 2.0)))
    rows = []
    for index in order:
        errors = matrix[index].copy()
        errors[index] = 0
        confused = f"{text(classes[errors.argmax()])} ({errors.max()})" if errors.max() else "–"
        rows.append(
            [
                text(classes[index]),
                str(truly[index]),
                f"{_share(recall[index])}{page.meter(recall[index])}",
                _share(precision[index]),
                _share(f1[index]),
                confused,
            ]
        )
    head = ["class", "samples", "recall", "precision", "F1", "most often taken for"]
    shown = page.table(head, rows[:ROWS_SHOWN], "Figures of each class")
    absent = int((truly == 0).sum())
    remark = f" {absent} have no test sample." if absent else ""
    if len(rows) > ROWS_SHOWN:
        shown += page.details(
            f"The other {len(rows) - ROWS_SHOWN} classes",
            page.table(head, rows[ROWS_SHOWN:], "Figures of the other classes"),
        )
    return page.lede(
        "Weakest first. Recall is the accuracy within the class; precision is how often the answer is right when "
        f"given.{remark}"
    ) + page.card(shown)


def examples_section(found: Predictions, classes: Sequence[str], source: Any | None) -> str:
    """The mistakes the network was surest of, the ones it found hardest, and the right answers it was surest of."""
    truth = found.probabilities[np.arange(len(found.labels)), found.labels]
    top = found.probabilities.max(axis=1)
    wrong = np.flatnonzero(found.predicted != found.labels)
    right = np.flatnonzero(found.predicted == found.labels)
    parts = []
    if len(wrong):
        worst = wrong[np.argsort(truth[wrong] - top[wrong], kind="stable")][:EXAMPLES]
        sentence = f"The mistakes of which the network was surest, out of {len(wrong)}."
        parts.append(f"<div><h3>Worst</h3>{page.lede(sentence)}{_gallery(worst, found, classes, source)}</div>")
    else:
        parts.append(page.note("No test sample was misclassified."))
    if len(right) and len(classes) > 1:
        narrow = right[np.argsort(truth[right], kind="stable")][: EXAMPLES // 2]
        best = _spread(right[np.argsort(-truth[right], kind="stable")], found.labels, EXAMPLES // 2)
        parts.append(f"<div><h3>Barely right</h3>{_gallery(narrow, found, classes, source)}</div>")
        parts.append(
            f"<div><h3>Best</h3>{page.lede('Right and sure, from different classes where there are several.')}"
            f"{_gallery(best, found, classes, source)}</div>"
        )
    return f'<div class="stack">{"".join(parts)}</div>'


def sample_picture(source: Any | None, index: int) -> tuple[Image.Image | None, str]:
    """Picture and name of a test sample; None and the reason where it cannot be had."""
    if source is None:
        return None, "the data is not at hand"
    try:
        sample = source.splits["test"][index]
    except (LookupError, OSError, ValueError, BadSample) as error:
        logger.warning("report: test sample %d cannot be shown: %s", index, error)
        return None, " ".join(str(error).split()) or type(error).__name__
    return sample.image, str(sample.name)


def _gallery(chosen: Int[np.ndarray, " shown"], found: Predictions, classes: Sequence[str], source: Any | None) -> str:
    return f'<div class="examples">{"".join(_example(int(i), found, classes, source) for i in chosen)}</div>'


def _example(row: int, found: Predictions, classes: Sequence[str], source: Any | None) -> str:
    label, said = int(found.labels[row]), int(found.predicted[row])
    image, name = sample_picture(source, int(found.indices[row]))
    if image is None:
        shot = f'<div class="none">no picture: {text(name)}</div>'
    else:
        image = image if image.mode in ("L", "RGB") else image.convert("RGB")
        tiny = max(image.size) <= 64
        image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
        alt = f"test sample {found.indices[row]}, true class {classes[label]}, predicted {classes[said]}"
        shot = (
            f'<img class="shot{" pixelated" if tiny else ""}" src="{data_uri(image)}" alt="{text(alt)}" '
            f'title="{text(name)}" loading="lazy">'
        )
    order = list(np.argsort(-found.probabilities[row], kind="stable")[:3])
    if label not in order:
        order[-1] = label
    bars = ""
    for index in order:
        chance = float(found.probabilities[row, index])
        kind = " truth" if index == label else " wrong" if index == said else ""
        figures = f"<span>{text(classes[index])}</span><span>{_chance(chance)}</span>{page.meter(chance)}"
        bars += f'<div class="prob{kind}">{figures}</div>'
    verdict = (
        text(classes[label])
        if said == label
        else f'{text(classes[label])} <span class="muted">taken for</span> {text(classes[said])}'
    )
    return f'<div class="example">{shot}<div class="body"><div class="title">{verdict}</div>{bars}</div></div>'


def _spread(
    order: Int[np.ndarray, " samples"], labels: Int[np.ndarray, " samples"], count: int
) -> Int[np.ndarray, " shown"]:
    """The first of each class in turn, in the given order, then the rest."""
    _, first = np.unique(labels[order], return_index=True)
    lead = np.sort(first)[:count]
    rest = np.setdiff1d(np.arange(len(order)), lead)[: count - len(lead)]
    return order[np.concatenate([lead, rest])]


def _confused_pairs(matrix: Int[np.ndarray, "classes classes"]) -> list[tuple[int, int, int]]:
    """(count, true, predicted) of all errors, the most frequent first."""
    off = matrix.copy()
    np.fill_diagonal(off, 0)
    true, said = np.nonzero(off)
    return sorted(
        ((int(off[t, s]), int(t), int(s)) for t, s in zip(true, said, strict=True)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )


def _share(value: float) -> str:
    return "–" if value != value else f"{value:.1%}"


def _chance(value: float) -> str:
    return f"{value:.1%}" if 0.001 <= value <= 0.999 or value in (0.0, 1.0) else ("<0.1%" if value < 0.5 else ">99.9%")
