"""What a dense task answers about an image does not depend on the other images of the batch."""

import pytest
import torch
from dense_batches import assert_answered_one_by_one, batch_of, task_and_model

CASES = [
    ("semantic-segmentation", {"decoder": "fpn"}),
    ("semantic-segmentation", {"decoder": "upernet", "flip": True, "scales": (1.0, 1.5)}),
    ("object-detection", {"detector": "fcos"}),
    ("instance-segmentation", {"detector": "mask_rcnn"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_an_image_is_answered_as_if_it_were_alone(name, options):
    task, model = task_and_model(name, **options)
    batch, _, _ = batch_of([(64, 96), (50, 70), (41, 96)])
    assert_answered_one_by_one(task, model, batch)


def test_images_of_one_size_are_computed_together():
    task, model = task_and_model("object-detection", detector="fcos")
    seen = []
    model.eval().register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    batch, _, _ = batch_of([(48, 64), (48, 64)])
    with torch.inference_mode():
        task.predict(model, batch)
    assert seen == [2]
