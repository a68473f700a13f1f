"""COCO's evaluation as the report does it: figures of known cases, and those that the task gives."""

import numpy as np
import pytest
import torch
from inspect_dense import detections

from coterie.data import Instances, open_data
from coterie.inspect.coco import evaluate_detections
from coterie.inspect.runs import Detections


class Known:
    """Images of 100 x 100 pixels with given objects: (label, box, crowd)."""

    def __init__(self, *images: list[tuple[int, list[float], bool]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def target(self, index: int) -> Instances:
        objects = self.images[index]
        boxes = np.array([box for _, box, _ in objects], dtype=np.float32).reshape(-1, 4)
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        labels = np.array([label for label, _, _ in objects], dtype=np.int64)
        return Instances((100, 100), boxes, labels, np.array([crowd for _, _, crowd in objects], dtype=bool), area)


def found(*rows: tuple[int, list[float], float, int]) -> Detections:
    """Detections from (image, box, score, label)."""
    index, boxes, scores, labels = zip(*rows, strict=True) if rows else ([], np.zeros((0, 4)), [], [])
    return Detections(
        np.array(index, dtype=np.int64), np.array(boxes, dtype=np.float32),
        np.array(scores, dtype=np.float32), np.array(labels, dtype=np.int64),
    )  # fmt: skip


BOX, OTHER, FAR = [10, 10, 30, 30], [50, 50, 90, 90], [0, 60, 8, 70]


def test_everything_found_is_an_average_precision_of_one() -> None:
    data = Known([(0, BOX, False), (1, OTHER, False)], [(0, OTHER, False)])
    figures = evaluate_detections(found((0, BOX, 0.9, 0), (0, OTHER, 0.8, 1), (1, OTHER, 0.7, 0)), data, "ab")
    assert figures.average() == pytest.approx([1, 1])
    assert figures.objects.tolist() == [2, 1]
    assert [match.errors(0.5) for match in figures.images] == [(0, 0), (0, 0)]
    assert figures.best_threshold() == pytest.approx((0.7, 1, 1, 1))


def test_a_sure_mistake_halves_the_precision() -> None:
    data = Known([(0, BOX, False)])
    figures = evaluate_detections(found((0, FAR, 0.9, 0), (0, BOX, 0.6, 0)), data, ["only"])
    assert figures.average(0).tolist() == [0.5]
    match = figures.images[0]
    assert match.right.tolist() == [False, True]
    assert match.found_at.tolist() == pytest.approx([0.6])
    assert match.errors(0.5) == (0, 1)
    assert match.errors(0.7) == (1, 1)


def test_overlap_decides_which_thresholds_count() -> None:
    data = Known([(0, [0, 0, 10, 10], False)])
    figures = evaluate_detections(found((0, [0, 0, 10, 8], 1.0, 0)), data, ["only"])  # IoU 0.8
    assert figures.average().item() == pytest.approx(7 / 10)
    assert figures.precision[:, 0, 0] == pytest.approx([1] * 7 + [0] * 3)


def test_crowds_take_any_number_and_count_nothing() -> None:
    data = Known([(0, BOX, False), (0, OTHER, True)])
    inside = [[55, 55, 65, 65], [60, 60, 80, 80]]
    rows = [(0, BOX, 0.5, 0), *((0, box, 0.9, 0) for box in inside)]
    figures = evaluate_detections(found(*rows), data, ["only"])
    assert figures.objects.tolist() == [1]
    assert figures.average() == pytest.approx([1])
    assert figures.images[0].errors(0.1) == (0, 0)


def test_classes_without_objects_have_no_precision_and_images_left_out_do_not_count() -> None:
    data = Known([(0, BOX, False)], [(0, OTHER, False)])
    figures = evaluate_detections(found((0, BOX, 0.9, 0)), data, "ab", skip=["image 1"])
    assert figures.average()[0] == pytest.approx(1)
    assert np.isnan(figures.average()[1])
    assert len(figures.images) == 1


def test_nothing_found() -> None:
    figures = evaluate_detections(found(), Known([(0, BOX, False)], []), ["only"])
    assert figures.average().tolist() == [0]
    assert figures.best_threshold()[1:] == (0, 0, 0)
    assert [match.errors(0.5) for match in figures.images] == [(1, 0), (0, 0)]


def test_predictions_of_other_data_are_refused() -> None:
    with pytest.raises(ValueError, match="of image 7, the data has 1"):
        evaluate_detections(found((7, BOX, 0.9, 0)), Known([(0, BOX, False)]), ["only"])


@pytest.mark.parametrize("masks", [False, True])
def test_the_figures_are_those_of_the_task(masks: bool) -> None:
    from coterie.tasks import create_task

    source = open_data("digit-scenes", target="instances", image_size=64)
    rows = detections(source, 30, np.random.default_rng(1), masks=True)
    answers = Detections(**rows)
    first = Subset30(source.splits["test"])
    figures = evaluate_detections(answers, first, source.classes, masks=masks)
    task = create_task("instance-segmentation", classes=source.classes)
    metrics = task.metrics()
    for index in range(30):
        chosen = np.flatnonzero(answers.indices == index)
        output = {name: torch.from_numpy(rows[name][chosen]) for name in ("boxes", "scores", "labels")}
        output["rle"] = [
            {"size": list(map(int, rows["sizes"][row])), "counts": bytes(rows["masks"][row])} for row in chosen
        ]
        target = first.target(index)
        truth = {
            name: torch.from_numpy(np.array(getattr(target, name))) for name in ("boxes", "labels", "crowd", "area")
        }
        task.update(metrics, [output], {"truth": [{**truth, "masks": target.masks}]})
    reported = task.report(metrics)
    prefix = "mask_" if masks else ""
    # The task may use faster_coco_eval, where a recall that equals a step of the curve to rounding can fall beside it.
    assert np.nanmean(figures.average()) == pytest.approx(reported[f"{prefix}ap"], abs=2e-3)
    assert np.nanmean(figures.average(0)) == pytest.approx(reported[f"{prefix}ap50"], abs=2e-3)
    assert np.nanmean(figures.average(5)) == pytest.approx(reported[f"{prefix}ap75"], abs=2e-3)


class Subset30:
    """The first 30 images of a dataset."""

    def __init__(self, dataset) -> None:
        self.dataset, self.name, self.target = dataset, dataset.name, dataset.target

    def __len__(self) -> int:
        return 30
