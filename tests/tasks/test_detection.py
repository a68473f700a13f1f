"""Object detection and instance segmentation: every detector trains, answers in original pixels, is judged right."""

import numpy as np
import pytest
import torch
from dense_batches import CLASSES, batch_of, task_and_model
from PIL import Image
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection.image_list import ImageList

from coterie.tasks import create_task

BOXES, MASKS = "object-detection", "instance-segmentation"
DETECTORS = [
    (BOXES, "retinanet"),
    (BOXES, "fcos"),
    (BOXES, "faster_rcnn"),
    (MASKS, "mask_rcnn"),
    (MASKS, "cascade_mask_rcnn"),
]
FEW = {"proposals": 60, "roi_samples": 32}


def options_of(detector):
    return {"detector": detector, **(FEW if detector.endswith("rcnn") else {})}


def without_objects(batch):
    empty = [{name: value[:0] for name, value in one.items()} for one in batch["instances"]]
    return {**batch, "instances": empty}


@pytest.mark.parametrize(("name", "detector"), DETECTORS)
def test_every_parameter_gets_a_gradient_with_and_without_objects(name, detector):
    task, model = task_and_model(name, **options_of(detector))
    batch, _, _ = batch_of([(50, 70), (64, 41)])
    one, _, _ = batch_of([(45, 45)], seed=1)
    mixed = {**batch, "instances": [batch["instances"][0], without_objects(batch)["instances"][1]]}
    for given in (mixed, without_objects(batch), one):
        model.zero_grad()
        loss = task.loss(model.train(), given)["loss"]
        loss.backward()
        assert loss.isfinite()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize(("name", "detector"), DETECTORS)
def test_answers_lie_in_the_original_image_the_best_first(name, detector):
    task, model = task_and_model(name, score_threshold=0.0, max_detections=20, **options_of(detector))
    batch, _, _ = batch_of([(50, 70), (64, 41)])
    batch["original_size"] = torch.tensor([[100, 210], [64, 41]])
    with torch.inference_mode():
        output = task.loss(model.eval(), batch)["output"]
    answers = task.answers(output, batch)
    for answer, (height, width) in zip(answers, batch["original_size"].tolist(), strict=True):
        assert 0 < len(answer["scores"]) <= 20
        assert (np.diff(answer["scores"]) <= 0).all()
        assert set(answer["labels"]) <= {0, 1}
        assert (answer["boxes"] >= 0).all()
        assert (answer["boxes"] <= [width, height, width, height]).all()
        if name == MASKS:
            assert answer["masks"].shape == (len(answer["scores"]), height, width)
            assert answer["masks"].dtype == bool
    assert answers[0]["boxes"][:, 2].max() > 70  # in original pixels, not in those of the batch
    rows = task.collect(output, batch)
    assert len({len(value) for value in rows.values()}) == 1
    assert rows["indices"].tolist() == [0] * len(answers[0]["scores"]) + [1] * len(answers[1]["scores"])


@pytest.mark.parametrize(
    ("name", "detector", "figure"), [(BOXES, "retinanet", "ap50"), (MASKS, "mask_rcnn", "mask_ap50")]
)
def test_it_learns_a_batch(name, detector, figure):
    task, model = task_and_model(name, **options_of(detector))
    batch, _, truth = batch_of([(64, 64), (50, 64)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(35):
        optimizer.zero_grad()
        task.loss(model, batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics = task.metrics()
    with torch.inference_mode():
        task.update(metrics, task.predict(model.eval(), batch), {"truth": truth})
    assert task.report(metrics)[figure] > 0.7


def test_crowds_and_boxes_without_area_are_not_trained_on():
    task, model = task_and_model(BOXES)
    batch, _, _ = batch_of([(64, 64)])
    objects = batch["instances"][0]
    torch.manual_seed(0)
    expected = task.loss(model.train(), batch)["loss"]
    more = {name: torch.cat([value, value[:1]]) for name, value in objects.items()}
    crowd = {**more, "crowd": torch.tensor([False, False, True])}
    flat = {**more, "boxes": torch.cat([objects["boxes"], torch.tensor([[9.0, 9.0, 9.0, 30.0]])])}
    for instances in (crowd, flat):
        torch.testing.assert_close(task.loss(model, {**batch, "instances": [instances]})["loss"], expected)


def test_anchors_stand_where_the_maps_look():
    from coterie.tasks._detectors import Anchors, roi_align

    anchors = Anchors([4, 8], [4.0], [1.0])
    maps = [torch.zeros(1, 1, 25, 13), torch.zeros(1, 1, 13, 7)]  # of an image of 100 x 51
    (boxes,) = anchors(ImageList(torch.zeros(1, 3, 100, 51), [(100, 51)]), maps)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert centres[25 * 13 - 1].tolist() == [4 * 12, 4 * 24]
    assert centres[-1].tolist() == [8 * 6, 8 * 12]
    assert boxes[0].tolist() == [-8, -8, 8, 8]
    pool = roi_align([2, 4, 8, 16], 7)
    levels = {str(level): torch.full((1, 1, 4, 4), float(level)) for level in range(4)}
    assert pool(levels, [torch.tensor([[0.0, 0.0, 500.0, 500.0]])], [(30, 30)]).shape == (1, 1, 7, 7)
    assert pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]


def test_cascade_averages_scores_and_refines_boxes_stage_by_stage():
    _, model = task_and_model(MASKS, detector="cascade_mask_rcnn", score_threshold=0.0, nms_threshold=1.0)
    heads = model.roi_heads.eval()
    biases = [[0.0, 1.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 2.0]]
    with torch.no_grad():
        for predictor, bias in zip(heads.box_predictors, biases, strict=True):
            predictor.cls_score.weight.zero_()
            predictor.cls_score.bias.copy_(torch.tensor(bias))
            predictor.bbox_pred.weight.zero_()
            predictor.bbox_pred.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    levels = {str(level): torch.zeros(1, 32, 16 >> level, 16 >> level) for level in range(4)}
    with torch.no_grad():
        detections, losses = heads(levels, [torch.tensor([[10.0, 10.0, 30.0, 30.0]])], [(64, 64)])
    assert losses == {}
    mean = torch.stack([torch.tensor(bias).softmax(0) for bias in biases]).mean(0)[1:]
    torch.testing.assert_close(detections[0]["scores"], mean.sort(descending=True).values)
    shift = 20 * (1 / 10 + 1 / 20 + 1 / 30)  # of a box 20 wide, with each stage's weight
    expected = torch.tensor([10 + shift, 10, 30 + shift, 30]).expand(2, 4)
    torch.testing.assert_close(detections[0]["boxes"], expected)


def random_results(seed, images=6):
    """Detections near the truth, with masks, and a crowd in every image."""
    from coterie.tasks._coco import encode

    generator = torch.Generator().manual_seed(seed)
    found, truth, dense = [], [], []
    for row in range(images):
        _, _, (true,) = batch_of([(60, 80)], seed=100 * seed + row, objects=3)
        boxes = true["boxes"] + 3 * torch.randn(3, 4, generator=generator)
        boxes = torch.cat([boxes[:, :2].clamp_min(0), torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)], 1)
        masks = true.pop("masks")
        pixels = torch.rand(3, 60, 80, generator=generator) < 0.5
        true["crowd"] = torch.tensor([False, False, True])
        answer = {"boxes": boxes, "scores": torch.rand(3, generator=generator), "labels": true["labels"]}
        found.append({**answer, "rle": encode(pixels)})
        truth.append({**true, "masks": masks})
        dense.append((
            {**answer, "masks": pixels},
            {"boxes": true["boxes"], "labels": true["labels"], "iscrowd": true["crowd"].long(), "area": true["area"],
             "masks": torch.from_numpy(_decoded(masks))},
        ))  # fmt: skip
    return found, truth, dense


def _decoded(masks):
    from coterie.tasks._coco import decode

    return decode(masks, 60, 80)


def test_figures_are_those_of_torchmetrics_on_dense_masks():
    task = create_task(MASKS, classes=CLASSES)
    found, truth, dense = random_results(3)
    metrics = task.metrics()
    task.update(metrics, found, {"truth": truth})
    theirs = MeanAveragePrecision(iou_type=("bbox", "segm"), class_metrics=True)
    theirs.update(*(list(part) for part in zip(*dense, strict=True)))
    expected = theirs.compute()
    figures = task.report(metrics)
    names = {"ap": "bbox_map", "ap50": "bbox_map_50", "ap_small": "bbox_map_small", "mask_ap": "segm_map"}
    for ours, name in names.items():
        assert figures[ours] == pytest.approx(expected[name].item(), abs=1e-6)
    assert 0 < figures["ap"] < 1
    by_class = expected["segm_map_per_class"].tolist()
    worst = min(range(2), key=lambda label: (by_class[label], label))
    assert task.comment(metrics)[0] == f"{CLASSES[worst]}: mask AP {by_class[worst]:.3f}"


def test_ranks_with_different_numbers_of_images_are_added(monkeypatch):
    import torch.distributed as dist

    task = create_task(MASKS, classes=CLASSES)
    found, truth, _ = random_results(4)
    whole, first, second = task.metrics(), task.metrics(), task.metrics()
    task.update(whole, found, {"truth": truth})
    task.update(first, found[:5], {"truth": truth[:5]})
    task.update(second, found[5:], {"truth": truth[5:]})
    states = [{name: getattr(one, name) for name in one._reductions} for one in (first, second)]
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda parts, mine, group=None: parts.__setitem__(slice(None), states)
    )
    second._sync_dist()
    assert task.report(second) == pytest.approx(task.report(whole))


def test_nothing_found_and_nothing_there():
    for name in (BOXES, MASKS):
        task = create_task(name, classes=CLASSES)
        batch, _, truth = batch_of([(40, 40)], objects=0)
        nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long(), "rle": []}
        metrics = task.metrics()
        task.update(metrics, [nothing], {"truth": truth})
        assert task.report(metrics)[task.summary] == 0.0
        assert task.comment(metrics) == []
        assert all(len(value) == 0 for value in task.collect([nothing], batch).values())
        assert task.draw(Image.new("RGB", (40, 40)), task.answers([nothing], batch)[0]).size == (40, 40)


def test_masks_are_pasted_into_their_boxes():
    from coterie.tasks.detection import _paste

    masks = torch.zeros(1, 1, 28, 28)
    masks[..., :14] = 1.0
    (pasted,) = _paste(masks, torch.tensor([[10.0, 20.0, 50.0, 40.0]]), (60, 70))
    assert pasted[20:40, 10:29].all()
    assert not pasted[:, 31:].any()
    assert not pasted[:19].any()


def test_pictures_of_answers_and_of_the_truth():
    task = create_task(MASKS, classes=CLASSES)
    image = Image.new("RGB", (120, 60))
    masks = np.zeros((1, 60, 120), dtype=bool)
    masks[0, 10:30, 10:40] = True
    answer = {"boxes": np.array([[10.0, 10.0, 40.0, 30.0]]), "labels": np.array([1]), "masks": masks}
    picture = task.draw(image, answer)
    assert picture.height > 60
    assert picture.getpixel((10, 20)) == task.palette()[1]
    assert list(picture.getpixel((25, 20))) == [round(part / 2) for part in task.palette()[1]]
    with_score = task.draw(image, {**answer, "scores": np.array([0.01])})
    assert with_score.size == picture.size
    assert with_score.tobytes() != picture.tobytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"detector": "mask_rcnn"}, "detector must be one of retinanet, fcos, faster_rcnn, got 'mask_rcnn'"),
        ({"channels": 40}, "channels must be a multiple of 32, got 40"),
        ({"anchor_scale": 0.0}, "anchor_scale must be above 0"),
        ({"score_threshold": 2.0}, "score_threshold must be from 0 to 1"),
        ({"proposals": 0}, "proposals must be at least 1"),
    ],
)
def test_options_that_it_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        create_task(BOXES, classes=CLASSES, **options)
