"""The classification task against plain formulas."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from coterie.tasks import create_task, list_tasks

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"image": torch.randn(8, 3, 4, 4), "label": torch.tensor([0, 1, 2, 3, 4, 5, 0, 1]), "index": torch.arange(8)}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, len(CLASSES)))


def test_unknown_task_is_named_with_its_neighbour() -> None:
    assert {"classification", "semantic-segmentation"} <= set(list_tasks())
    with pytest.raises(ValueError, match=r"'classify', takes one of .*did you mean classification"):
        create_task("classify", classes=CLASSES)


def test_loss_is_cross_entropy_smoothed_in_training_only(batch: dict, model: nn.Module) -> None:
    task = create_task("classification", classes=CLASSES, augment={"label_smoothing": 0.3})
    log = model(batch["image"]).log_softmax(-1)
    hard = -log[torch.arange(8), batch["label"]].mean()
    torch.testing.assert_close(task.loss(model.eval(), batch)["loss"], hard)
    smooth = 0.7 * hard - 0.3 * log.mean()
    torch.testing.assert_close(task.loss(model.train(), batch)["loss"], smooth)


def test_mixup_mixes_images_and_targets_alike_and_follows_the_seed(batch: dict) -> None:
    task = create_task("classification", classes=CLASSES, augment={"mixup": 1.0})
    np.random.seed(3)  # noqa: NPY002  timm draws from the global generator
    mixed = task.prepare_batch(batch)
    share = mixed["target"][0, 0].item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed["target"].sum(1), torch.ones(8))
    torch.testing.assert_close(mixed["image"], share * batch["image"] + (1 - share) * batch["image"].flip(0))
    np.random.seed(3)  # noqa: NPY002
    torch.testing.assert_close(task.prepare_batch(batch)["image"], mixed["image"], rtol=0, atol=0)


def test_mixing_an_odd_batch_leaves_the_last_image_out(batch: dict, model: nn.Module) -> None:
    task = create_task("classification", classes=CLASSES, augment={"cutmix": 1.0})
    odd = {name: value[:7] for name, value in batch.items()}
    mixed = task.prepare_batch(odd)
    assert {len(value) for value in mixed.values()} == {6}
    assert task.loss(model.train(), mixed)["loss"].isfinite()


def test_without_mixing_the_batch_is_left_alone(batch: dict) -> None:
    assert create_task("classification", classes=CLASSES).prepare_batch(batch) is batch


def test_metrics_count_right_answers() -> None:
    task = create_task("classification", classes=CLASSES)
    metrics = task.metrics()
    logits = torch.eye(6)[torch.tensor([0, 0, 1, 1])]
    task.update(metrics, logits, {"label": torch.tensor([0, 0, 0, 1]), "index": torch.arange(4)})
    report = task.report(metrics)
    assert report["accuracy"] == pytest.approx(3 / 4)
    assert report["macro_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert report["top5_accuracy"] >= report["accuracy"]
    assert task.comment(metrics) == ["1 of 3 images of ant are taken for bee"]


def test_two_classes_have_no_top_five() -> None:
    task = create_task("classification", classes=["no", "yes"])
    metrics = task.metrics()
    task.update(metrics, torch.tensor([[2.0, 1.0]]), {"label": torch.tensor([0]), "index": torch.tensor([0])})
    assert set(task.report(metrics)) == {"accuracy", "macro_accuracy"}


def test_answers_are_sorted_and_collected_probabilities_add_to_one(batch: dict) -> None:
    task = create_task("classification", classes=CLASSES)
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.2, 0.05, 0.1, 0.05]]))
    (answers,) = task.describe(logits)
    assert answers[0] == ("bee", pytest.approx(0.5))
    assert [name for name, _ in answers[:2]] == ["bee", "cat"]
    kept = task.collect(logits, {"label": torch.tensor([1]), "index": torch.tensor([7])})
    assert kept["probabilities"].dtype == torch.float16
    assert math.isclose(float(kept["probabilities"].sum()), 1, abs_tol=2e-3)
    assert (int(kept["labels"]), int(kept["indices"])) == (1, 7)


def test_model_takes_channels_classes_and_drop_path_from_data_and_configuration() -> None:
    task = create_task("classification", classes=CLASSES)
    source = SimpleNamespace(channels=1, classes=CLASSES)
    model = task.build_model(
        SimpleNamespace(name="dgt_pico", options={"dims": (8, 8, 8, 8), "num_heads": (1,) * 4}, drop_path=0.2), source
    )
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 6)
    with pytest.raises(ValueError, match=r"model dgt_pico: .*depht"):
        task.build_model(SimpleNamespace(name="dgt_pico", options={"depht": 3}, drop_path=0.0), source)


def test_drawing_names_answer_and_truth() -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    axes = Figure().subplots()
    task = create_task("classification", classes=CLASSES)
    task.draw(axes, Image.new("L", (4, 4)), torch.tensor([9.0, 0, 0, 0, 0, 0]), label=1)
    assert axes.get_title() == "ant (100%), is bee"
