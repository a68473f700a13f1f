"""Semantic segmentation: losses, evaluation by windows, scales and mirroring, figures, pictures."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_batches import batch_of, task_and_model
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from coterie.tasks import create_task
from coterie.tasks.segmentation import _starts

NAME = "semantic-segmentation"
SIZES = [(64, 64), (50, 64), (64, 37)]


def evaluated(batch, maps):
    return {**{k: v for k, v in batch.items() if k not in ("label_map", "instances")}, "truth": maps}


def confusion_of(task, pairs):
    metrics = task.metrics()
    batch = {"truth": [torch.tensor([true]) for _, true in pairs]}
    task.update(metrics, [torch.tensor([answer], dtype=torch.uint8) for answer, _ in pairs], batch)
    return metrics


@pytest.mark.parametrize("decoder", ["upernet", "fpn"])
def test_it_learns_a_batch_of_padded_images(decoder):
    task, model = task_and_model(NAME, decoder=decoder, dice=0.5)
    batch, maps, _ = batch_of(SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(32):
        loss = task.loss(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = task.metrics()
    model.eval()
    with torch.inference_mode():
        result = task.loss(model, evaluated(batch, maps))
    task.update(metrics, result["output"], {"truth": maps})
    assert task.report(metrics)["miou"] > 0.7
    assert result["loss"] < 0.3


@pytest.mark.parametrize("decoder", ["upernet", "fpn"])
@pytest.mark.parametrize("model", ["dgt_pico", "resnet10t"])
def test_any_size_one_image_and_every_parameter_gets_a_gradient(decoder, model):
    task, model = task_and_model(NAME, model, decoder=decoder)
    batch, _, _ = batch_of([(45, 71)])
    result = task.loss(model.train(), batch)
    assert result["output"].shape == (1, 3, 45, 71)
    result["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_labels_that_are_all_ignored_give_a_loss_of_zero():
    task, model = task_and_model(NAME, dice=1.0)
    batch, maps, _ = batch_of([(40, 40)])
    loss = task.loss(model.train(), {**batch, "label_map": torch.full_like(batch["label_map"], 255)})["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad.isfinite().all() and not p.grad.any() for p in model.parameters())
    empty = evaluated(batch, [torch.full_like(maps[0], 255)])
    result = task.loss(model.eval(), empty)
    assert result["loss"] == 0
    metrics = task.metrics()
    task.update(metrics, result["output"], empty)
    assert task.report(metrics) == {"miou": 0.0, "mean_accuracy": 0.0, "pixel_accuracy": 0.0}
    assert task.comment(metrics) == []


class Fixed(nn.Module):
    """Gives the logits that it was made with, in training as a list."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.ParameterList(logits)

    def forward(self, image, mask=None):
        return list(self.logits) if self.training else self.logits[0]


def test_the_loss_is_the_mean_over_labelled_pixels():
    torch.manual_seed(0)
    main, auxiliary = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 1:] = 255
    known = labels != 255

    def expected(logits):
        return F.cross_entropy(logits.permute(0, 2, 3, 1)[known], labels[known])

    task = create_task(NAME, classes=["a", "b", "c"], auxiliary=0.3)
    loss = task.loss(Fixed(main, auxiliary).train(), {"image": main, "label_map": labels})["loss"]
    torch.testing.assert_close(loss, expected(main) + 0.3 * expected(auxiliary))

    sure = 50 * F.one_hot(labels.where(known, 0), 3).permute(0, 3, 1, 2).float()
    task = create_task(NAME, classes=["a", "b", "c"], dice=2.0)
    right = task.loss(Fixed(sure).train(), {"image": main, "label_map": labels})["loss"]
    wrong = task.loss(Fixed(sure.roll(1, 1)).train(), {"image": main, "label_map": labels})["loss"]
    assert right < 1e-5
    torch.testing.assert_close(wrong, torch.tensor(50 + 2.0), rtol=1e-4, atol=1e-4)


class Pointwise(nn.Module):
    """Logits that only depend on the pixel, so that windows and mirroring must not change them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, image):
        self.seen.append(tuple(image.shape[2:]))
        return image


@pytest.mark.parametrize("size", [(64, 64), (40, 150), (100, 33), (65, 64)])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.9])
def test_windows_and_mirroring_cover_every_pixel(size, overlap):
    torch.manual_seed(0)
    options = {"window": 48, "overlap": overlap, "flip": True}
    task, model = create_task(NAME, classes=["a", "b", "c"], **options), Pointwise().eval()
    image = torch.randn(1, 3, *size)
    original = [2 * size[0], 3 * size[1]]
    batch = {"image": image, "size": torch.tensor([size]), "original_size": torch.tensor([original])}
    expected = F.interpolate(image.softmax(1).log(), original, mode="bilinear").argmax(1)[0]
    (answer,) = task.predict(model, batch)
    assert answer.dtype == torch.uint8
    assert (answer == expected).float().mean() > 0.999  # where two classes are equal, rounding decides
    assert all(max(shape) <= 48 for shape in model.seen)


def test_windows_begin_so_that_the_last_one_ends_with_the_image():
    assert list(_starts(100, 48, 32)) == [0, 32, 52]
    assert list(_starts(48, 48, 32)) == [0]
    assert list(_starts(20, 48, 32)) == [0]


def test_scales_average_probabilities():
    class AtScale(nn.Module):
        def forward(self, image):
            logits = torch.zeros(1, 2, *image.shape[2:])
            logits[:, 0] = 3.0 if image.shape[2] == 40 else -1.0
            return logits

    task = create_task(NAME, classes=["a", "b"], scales=[1.0, 0.5])
    scores = task._scores(AtScale().eval(), torch.zeros(1, 3, 40, 30))
    first = torch.tensor([3.0, 0.0]).softmax(0) / 2 + torch.tensor([-1.0, 0.0]).softmax(0) / 2
    torch.testing.assert_close(scores[0, :, 7, 9].exp(), first)
    assert scores.shape == (1, 2, 40, 30)


def test_answers_have_the_original_size_and_the_loss_counts_there():
    task, model = task_and_model(NAME)
    batch, _, _ = batch_of([(40, 40), (30, 40)])
    batch["original_size"] = torch.tensor([[80, 80], [31, 41]])
    truth = [torch.zeros(80, 80, dtype=torch.int64), torch.full((31, 41), 255)]
    with torch.inference_mode():
        result = task.loss(model.eval(), evaluated(batch, truth))
        logits = model(batch["image"], batch["mask"])
    assert [tuple(one.shape) for one in result["output"]] == [(80, 80), (31, 41)]
    large = F.interpolate(logits[:1], (80, 80), mode="bilinear")
    torch.testing.assert_close(result["loss"], F.cross_entropy(large, truth[0][None]))
    predicted = task.predict(model, evaluated(batch, truth))
    assert all(torch.equal(a, b) for a, b in zip(predicted, result["output"], strict=True))
    answers = task.answers(result["output"], batch)
    assert answers[1]["label_map"].shape == (31, 41)
    assert answers[1]["label_map"].dtype == np.uint8


def test_figures_are_those_of_torchmetrics():
    torch.manual_seed(0)
    task = create_task(NAME, classes=["a", "b", "c", "d"])
    truth = [torch.randint(0, 3, (9, 11)), torch.randint(0, 3, (20, 5))]
    truth[0][:3] = 255
    output = [torch.randint(0, 3, t.shape, dtype=torch.uint8) for t in truth]  # class d does not occur
    metrics = task.metrics()
    task.update(metrics, output, {"truth": truth})
    theirs = MulticlassJaccardIndex(4, average="none", ignore_index=255)
    for answer, true in zip(output, truth, strict=True):
        theirs.update(answer.long()[None], true[None])
    figures = task.report(metrics)
    assert figures["miou"] == pytest.approx(theirs.compute()[:3].mean().item())
    known = torch.cat([(t != 255).flatten() for t in truth])
    right = torch.cat([(o == t).flatten() for o, t in zip(output, truth, strict=True)])
    assert figures["pixel_accuracy"] == pytest.approx(right[known].float().mean().item())
    rows = task.collect(output, {"truth": truth, "index": torch.tensor([5, 8])})
    assert rows["indices"].tolist() == [5, 8]
    assert torch.equal(rows["confusion"].sum(0), metrics.compute())


def test_classes_that_are_answered_but_never_true_count_against():
    task = create_task(NAME, classes=["road", "sky", "car"])
    metrics = confusion_of(task, [([0, 0, 1, 2], [0, 0, 1, 1])])
    assert task.report(metrics)["miou"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert task.comment(metrics) == [
        "car: IoU 0.000; it does not occur, and yet is answered",
        "sky: IoU 0.500; 50% of its pixels are taken for car",
        "road: IoU 1.000",
    ]


def test_a_single_class():
    task, model = task_and_model(NAME, classes=["tissue"])
    batch, maps, _ = batch_of([(40, 40)])
    loss = task.loss(model.train(), {**batch, "label_map": batch["label_map"].clamp(max=0)})["loss"]
    assert loss == 0
    metrics = task.metrics()
    task.update(metrics, task.predict(model.eval(), batch), {"truth": [maps[0].clamp(max=0)]})
    assert task.report(metrics)["miou"] == 1.0


def test_pictures():
    task = create_task(NAME, classes=["background", "cat", "dog"])
    assert task.palette()[0] == (0, 0, 0)
    assert len(set(task.palette())) == 3
    assert task.palette() == create_task(NAME, classes=["background", "cat", "dog"]).palette()
    image = Image.new("RGB", (80, 40), (100, 100, 100))
    label_map = np.zeros((40, 80), dtype=np.uint8)
    label_map[:, 40:] = 2
    label_map[0] = 255
    picture = task.draw(image, {"label_map": label_map})
    assert picture.width == 80
    assert picture.height > 40  # the legend
    assert picture.getpixel((10, 20)) == (100, 100, 100)
    assert picture.getpixel((60, 0)) == (100, 100, 100)
    mixed = [round(0.45 * 100 + 0.55 * part) for part in task.palette()[2]]
    assert list(picture.getpixel((60, 20))) == mixed
    assert task.draw(image, {"label_map": np.zeros((40, 80), dtype=np.uint8)}).size == (80, 40)


def test_many_classes_have_different_colours():
    assert len(set(create_task(NAME, classes=[f"c{n}" for n in range(150)]).palette())) == 150


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decoder": "unet"}, "decoder must be one of upernet, fpn, got 'unet'"),
        ({"dice": -1.0}, "dice must be at least 0"),
        ({"scales": []}, "scales must be numbers above 0"),
        ({"scales": [0.0]}, "scales must be numbers above 0"),
        ({"window": 8}, "window must be at least 32"),
        ({"overlap": 1.0}, "overlap must be at least 0 and below 1"),
        ({"channels": 100}, "channels must be a multiple of 64, got 100"),
    ],
)
def test_options_that_it_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        create_task(NAME, classes=["a", "b"], **options)


def test_too_many_classes():
    with pytest.raises(ValueError, match="1 to 255"):
        create_task(NAME, classes=[str(n) for n in range(256)])
