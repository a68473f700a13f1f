"""The results of a run, whatever it was trained for, as the report shows them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from coterie.inspect import detection, page, segmentation
from coterie.inspect.coco import evaluate_detections
from coterie.inspect.network import Network
from coterie.inspect.report_groups import IMAGES, choose_samples
from coterie.inspect.report_setup import bad_samples
from coterie.inspect.results import classes_section, confusion_section, examples_section
from coterie.inspect.runs import Run
from coterie.inspect.showcase import Showcase


@dataclass
class Results:
    """What was found on the test split.

    Attributes:
        headline: Figures of the header, (name, value).
        sentence: What came out, for the overview.
        sections: (id, heading, HTML) in order.
        worth_a_look: Numbers of test images on which groups are shown.
    """

    headline: list[tuple[str, str]]
    sentence: str
    sections: list[tuple[str, str, str]]
    worth_a_look: list[int]


def read_results(run: Run, classes: Sequence[str], source: Any | None, network: Network | None) -> Results | None:
    """The results of a finished run; None where there are no predictions."""
    if run.predictions is not None:
        return _classified(run, classes, source)
    if run.label_maps is not None:
        return _segmented(run, classes, source, network)
    return _detected(run, classes, source) if run.detections is not None else None


def _classified(run: Run, classes: Sequence[str], source: Any | None) -> Results:
    found = run.predictions
    assert found is not None
    wrong = int((found.predicted != found.labels).sum())
    margin = 1.96 * math.sqrt(found.accuracy * (1 - found.accuracy) / len(found.labels))
    sentence = (
        f"{len(found.labels) - wrong} of {len(found.labels)} test samples are right, {wrong} wrong. With so many "
        f"samples the accuracy is known to about ±{margin:.1%} (95 % interval)."
    )
    sections = [
        ("confusion", "Confusion", confusion_section(found, classes)),
        ("classes", "Classes", classes_section(found, classes)),
        ("examples", "Examples", examples_section(found, classes, source)),
    ]
    return Results([("test accuracy", f"{found.accuracy:.2%}")], sentence, sections, choose_samples(run, source))


def _segmented(run: Run, classes: Sequence[str], source: Any | None, network: Network | None) -> Results:
    found = run.label_maps
    assert found is not None

    def answer_of(index: int, image: Image.Image) -> dict[str, Any]:
        if network is None or network.predictor is None:
            raise ValueError("the network is not at hand")
        return network.predictor.answer([image])[0]

    task = _task(run, classes)
    overlap = segmentation.class_figures(found.confusion())[0]
    value = float(np.nanmean(overlap)) if np.isfinite(overlap).any() else 0.0
    sections = [
        ("confusion", "Confusion", segmentation.confusion_section(found, classes)),
        ("classes", "Classes", segmentation.classes_section(found, classes, task.palette())),
        ("examples", "Examples", segmentation.examples_section(found, Showcase(task, source, answer_of))),
    ]
    chosen = segmentation.choose(found, IMAGES)
    return Results([("test mean IoU", f"{value:.2%}")], segmentation.overview(found), sections, chosen)


def _detected(run: Run, classes: Sequence[str], source: Any | None) -> Results:
    found = run.detections
    assert found is not None
    names = {"ap": "test box AP", "mask_ap": "test mask AP"}
    figures = [(said, f"{run.tested[key]:.2%}") for key, said in names.items() if key in run.tested]
    if source is None or "test" not in source.splits:
        message = "The data is not at hand, so the detections cannot be compared with the truth."
        return Results(figures, f"{len(found.scores)} detections.", [("results", "Results", page.note(message))], [])
    dataset, skip = source.splits["test"], list(bad_samples(run))
    try:
        boxes = evaluate_detections(found, dataset, classes, skip=skip)
        masks = evaluate_detections(found, dataset, classes, masks=True, skip=skip) if found.masks is not None else None
    except ValueError as error:
        message = f"The detections do not fit the data: {error}"
        return Results(figures, f"{len(found.scores)} detections.", [("results", "Results", page.note(message))], [])
    task, least = _task(run, classes), boxes.best_threshold()[0]
    showcase = Showcase(task, source, functools.partial(detection.stored_answer, found, least))
    sections = [
        ("precision", "Precision and recall", detection.curves_section(boxes, masks, classes)),
        ("classes", "Classes", detection.classes_section(boxes, masks, classes, task.palette())),
        ("examples", "Examples", detection.examples_section(boxes, showcase)),
    ]
    return Results(figures, detection.overview(boxes), sections, detection.choose(boxes, IMAGES))


def _task(run: Run, classes: Sequence[str]) -> Any:
    """The run's task; where the configuration is missing one that draws what the predictions are."""
    from coterie.tasks import create_task, list_tasks, task_class

    masks = run.detections is not None and run.detections.masks is not None
    suited = [name for name in list_tasks() if (task_class(name).target, task_class(name).masks) == (run.target, masks)]
    return create_task(run.setting("task.name", suited[0]), classes=classes, **run.setting("task.options", {}))
