"""Every system's backbone under the dense tasks: images of several sizes in a batch, gradients, and no batch mates."""

import pytest
from dense_batches import SMALL, assert_answered_one_by_one, batch_of, task_and_model

from coterie.models import list_models

BACKBONES = [name for name in SMALL if name in list_models()]
TASKS = [("semantic-segmentation", {"decoder": "fpn"}), ("object-detection", {"detector": "fcos"})]
SIZES = [(64, 96), (50, 70)]


def test_every_system_is_here():
    assert {name.split("_")[0] for name in BACKBONES} == {name.split("_")[0] for name in list_models()}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(("name", "options"), TASKS)
def test_a_padded_batch_trains_and_is_answered_one_by_one(backbone, name, options):
    task, model = task_and_model(name, backbone, **options)
    batch, _, _ = batch_of(SIZES)
    loss = task.loss(model.train(), batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without, without
    assert_answered_one_by_one(task, model, batch)
