"""The results part of a report on detectors: precision over recall, classes, and images from worst to best."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from coterie.inspect import page
from coterie.inspect.charts import Series, line_chart
from coterie.inspect.coco import RECALLS, CocoFigures, ImageMatch
from coterie.inspect.page import text
from coterie.inspect.runs import Detections
from coterie.inspect.segmentation import OTHERS, WORST, share, swatch
from coterie.inspect.showcase import Answer, Showcase

CURVES_SHOWN = 24
LEVELS = {"IoU 0.50": 0, "IoU 0.75": 5, "IoU 0.90": 8}


def overview(figures: CocoFigures) -> str:
    """The sentence about all test images."""
    least, precision, recall, f1 = figures.best_threshold()
    known = np.isfinite(figures.average())
    ap = figures.average()[known].mean() if known.any() else 0.0
    return (
        f"{len(figures.images)} test images with {figures.objects.sum()} objects: box AP {ap:.1%}. From a score of "
        f"{least:.2f} on, where F1 is highest ({f1:.2f}), {recall:.1%} of the objects are found, and {precision:.1%} "
        "of what is reported is right (at an IoU of 0.5)."
    )


def curves_section(boxes: CocoFigures, masks: CocoFigures | None, classes: Sequence[str]) -> str:
    """Precision over recall: of all classes at three overlaps, and of each class."""
    cards = []
    for name, figures in (("boxes", boxes), ("masks", masks)):
        if figures is None:
            continue
        lines = [Series(level, RECALLS, _mean(figures.precision[place]), style=style)
                 for style, (level, place) in enumerate(LEVELS.items())]  # fmt: skip
        cards.append(page.card(_chart(lines, f"Mean over the classes, {name}"), f"All classes, {name}"))
    cards.append(page.card(_by_score(boxes), "By score, all classes, IoU 0.50"))
    lede = page.lede(
        "Going down the detections from the surest to the least sure: the share found so far (recall) and the share of "
        "right ones among those reported (precision). AP is the area under the curve."
    )
    average = boxes.average(0)
    known = [label for label in np.argsort(average, kind="stable").tolist() if np.isfinite(average[label])]
    single = []
    for label in known[:CURVES_SHOWN] if len(classes) > 1 else []:
        lines = [
            Series(f"{kind}, AP50", RECALLS, figures.precision[0, :, label], style=style)
            for style, (kind, figures) in enumerate((("boxes", boxes), ("masks", masks)))
            if figures is not None
        ]
        describe = f"Precision over recall of {classes[label]} at an IoU of 0.5"
        heading = f"{classes[label]}: AP50 {average[label]:.1%}"
        single.append(page.card(_chart(lines, describe), heading))
    more = f", the {CURVES_SHOWN} weakest of {len(known)}" if len(known) > CURVES_SHOWN else ", the weakest first"
    parts = page.details(f"Curves of each class{more}", page.cards(single)) if single else ""
    return f'{lede}<div class="stack">{page.cards(cards)}{parts}</div>'


def classes_section(
    boxes: CocoFigures, masks: CocoFigures | None, classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> str:
    """AP of each class, the weakest first, and how many of its objects are found."""
    least = boxes.best_threshold()[0]
    average, half, three_quarters = boxes.average(), boxes.average(0), boxes.average(5)
    mask_average = masks.average() if masks is not None else None
    found, right, said = (np.zeros(len(classes), dtype=np.int64) for _ in range(3))
    for match in boxes.images:
        chosen = match.scores >= least
        found += np.bincount(match.true_labels[match.found_at >= least], minlength=len(classes))
        right += np.bincount(match.labels[chosen & match.right], minlength=len(classes))
        said += np.bincount(match.labels[chosen], minlength=len(classes))
    rows = []
    for label in np.argsort(np.where(np.isfinite(average), average, 2.0), kind="stable").tolist():
        row = [
            f"{swatch(palette[label])}{text(classes[label])}",
            str(boxes.objects[label]),
            f"{share(average[label])}{page.meter(average[label])}",
            share(half[label]),
            share(three_quarters[label]),
        ]
        if mask_average is not None:
            row.append(f"{share(mask_average[label])}{page.meter(mask_average[label])}")
        of = boxes.objects[label]
        row += [
            share(found[label] / of if of else np.nan),
            share(right[label] / said[label] if said[label] else np.nan),
        ]
        rows.append(row)
    head = ["class", "objects", "box AP", "AP50", "AP75", *(["mask AP"] if masks is not None else [])]
    head += ["recall", "precision"]
    lede = f"Weakest first. Recall and precision: detections with a score of at least {least:.2f}, at an IoU of 0.5."
    absent = int((boxes.objects == 0).sum())
    remark = f" {absent} have no object in the test images." if absent else ""
    return page.lede(lede + remark) + page.card(page.table(head, rows, "Figures of each class"))


def examples_section(boxes: CocoFigures, showcase: Showcase) -> str:
    """Images with the most errors, typical ones, and those without an error that show most."""
    least = boxes.best_threshold()[0]
    errors = np.array([sum(match.errors(least)) for match in boxes.images])
    objects = np.array([len(match.true_labels) for match in boxes.images])
    order = np.lexsort((objects, -errors))  # of two with as many errors first the one that has fewer objects
    worst = [row for row in order[:WORST] if errors[row]]
    rest = order[len(worst) :]
    best = rest[::-1][:OTHERS]
    middle = rest[: len(rest) - len(best)]
    start = max(len(middle) // 2 - OTHERS // 2, 0)

    def entries(rows: Sequence[int] | np.ndarray) -> list[tuple[int, str, str]]:
        return [_entry(boxes.images[row], least) for row in rows]

    none = "" if worst else page.note("No object of the test images was missed, and nothing wrong was reported.")
    said = f"The most objects missed and wrong detections, from a score of {least:.2f} on."
    parts = [
        none,
        showcase.gallery("Worst", entries(worst), said),
        showcase.gallery("Typical", entries(middle[start : start + OTHERS]), "From the middle of the order."),
        showcase.gallery("Best", entries(best)),
    ]
    return f'<div class="stack">{"".join(parts)}</div>'


def choose(boxes: CocoFigures, count: int) -> list[int]:
    """Numbers of test images worth a look: a good one with many objects, the worst one, then others."""
    least = boxes.best_threshold()[0]
    order = sorted(boxes.images, key=lambda match: (sum(match.errors(least)), -len(match.true_labels)))
    return list(dict.fromkeys(match.index for match in (order[:1] + order[-1:] + order)))[:count]


def stored_answer(found: Detections, least: float, index: int, image: Image.Image) -> Answer:
    """The detections of one test image, as a task draws them, from a score of `least` on."""
    rows = np.flatnonzero((found.indices == index) & (found.scores >= least))
    rows = rows[np.argsort(-found.scores[rows], kind="stable")]
    answer: Answer = {"boxes": found.boxes[rows], "scores": found.scores[rows], "labels": found.labels[rows]}
    if found.masks is not None and found.sizes is not None:
        from pycocotools import mask as codec

        shapes = [{"size": found.sizes[row].tolist(), "counts": bytes(found.masks[row])} for row in rows]
        decoded = codec.decode(shapes).transpose(2, 0, 1) if shapes else np.zeros((0, image.height, image.width))
        answer["masks"] = decoded.astype(bool)
    return answer


def _entry(match: ImageMatch, least: float) -> tuple[int, str, str]:
    missed, wrong = match.errors(least)
    count = len(match.true_labels)
    objects = f"{count} object{'' if count == 1 else 's'}"
    return match.index, f"test image {match.index}", f"{objects}: {missed} missed; {wrong} wrong detections"


def _mean(precision: np.ndarray) -> np.ndarray:
    known = np.isfinite(precision).all(axis=0)
    return precision[:, known].mean(axis=1) if known.any() else np.full(len(precision), np.nan)


def _by_score(figures: CocoFigures) -> str:
    """Precision, recall and F1 of all detections above each score."""
    steps = np.linspace(0, 1, 101)
    scores = np.concatenate([match.scores for match in figures.images] or [np.zeros(0)])
    right = np.concatenate([match.right for match in figures.images] or [np.zeros(0, dtype=bool)])
    total = max(int(figures.objects.sum()), 1)
    said = np.array([(scores >= least).sum() for least in steps])
    hits = np.array([(right & (scores >= least)).sum() for least in steps])
    precision, recall = np.where(said > 0, hits / np.maximum(said, 1), np.nan), hits / total
    f1 = 2 * hits / np.maximum(said + total, 1)
    lines = [
        Series("precision", steps, precision, style=0),
        Series("recall", steps, recall, style=1),
        Series("F1", steps, f1, style=2),
    ]
    describe = "Precision, recall and F1 over the least score"
    return line_chart(lines, x_label="least score", describe=describe, percent=True, unit=True)


def _chart(lines: Sequence[Series], describe: str) -> str:
    return line_chart(lines, x_label="recall", describe=describe, percent=True, unit=True)
