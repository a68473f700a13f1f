"""Batches of coloured rectangles and ellipses, in the form in which the data come, and the smallest models for them."""

from types import SimpleNamespace

import numpy as np
import torch

from coterie.tasks import create_task

CLASSES = ["rectangle", "ellipse"]
NARROW = {"dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}
SMALL = {
    "dgt_pico": {"stem_stride": 2, **NARROW},
    "resnet10t": {},
    "biformer_tiny": {**NARROW, "regions": (4, 4, 2, 1)},
    "crossformer_small": {**NARROW, "group_size": (3, 3, 2, 2), "interval": (2, 2, 1, 1)},
    "crossformer_pp_small": {**NARROW, "group_size": (3, 3, 2, 2), "interval": (2, 2, 1, 1)},
    "litv2_small": NARROW,
    "agent_swin_tiny": {**NARROW, "img_size": 64, "agents": (3, 2, 2, 2)},
    "agent_pvt_tiny": {**NARROW, "img_size": 64, "agents": (3, 2, 2, 1)},
    "agent_cswin_tiny": {**NARROW, "img_size": 64, "agents": (3, 2, 2, 2), "stripe_width": 2},
    "agent_deit_tiny": {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 2},
    "dcvit_tiny": {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 2},
}
COLORS = torch.tensor([[2.0, -1.0, 0.5], [-1.0, 1.5, 2.0]])


def scene(height, width, generator, objects=2):
    """An image, and boxes, labels and masks of what is in it; a later object covers an earlier one."""
    image = 0.2 * torch.randn(3, height, width, generator=generator)
    label_map = torch.zeros(height, width, dtype=torch.int64)
    boxes, labels, masks = [], [], []
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for number in range(objects):
        high, wide = (int(torch.randint(side // 4, side // 2, (), generator=generator)) for side in (height, width))
        top = int(torch.randint(0, height - high + 1, (), generator=generator))
        left = int(torch.randint(0, width - wide + 1, (), generator=generator))
        label = number % len(CLASSES)
        dy, dx = (y - top - high / 2) / (high / 2), (x - left - wide / 2) / (wide / 2)
        mask = ((dy.abs() < 1) & (dx.abs() < 1)) if label == 0 else dy.square() + dx.square() < 1
        image[:, mask] += COLORS[label][:, None]
        label_map[mask] = label + 1
        boxes.append([left, top, left + wide, top + high])
        labels.append(label)
        masks.append(mask)
    return (
        image,
        label_map,
        {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "crowd": torch.zeros(objects, dtype=torch.bool),
            "masks": torch.stack(masks).to(torch.uint8) if masks else torch.zeros(0, height, width, dtype=torch.uint8),
        },
    )


def batch_of(sizes, seed=0, objects=2):
    """One batch for training and evaluation at once; the original of each image has its own size."""
    from coterie.tasks._coco import encode

    generator = torch.Generator().manual_seed(seed)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    image = torch.zeros(len(sizes), 3, height, width)
    mask = torch.zeros(len(sizes), height, width, dtype=torch.bool)
    label_map = torch.full((len(sizes), height, width), 255)
    instances, truth_maps, truth = [], [], []
    for row, (h, w) in enumerate(sizes):
        pixels, labels, objects_here = scene(h, w, generator, objects)
        image[row, :, :h, :w], mask[row, :h, :w], label_map[row, :h, :w] = pixels, True, labels
        masks = torch.zeros(len(objects_here["labels"]), height, width, dtype=torch.uint8)
        masks[:, :h, :w] = objects_here["masks"]
        instances.append({**objects_here, "masks": masks})
        truth_maps.append(labels)
        area = objects_here["masks"].sum((1, 2)).float()
        truth.append({**objects_here, "area": area, "masks": encode(objects_here["masks"].bool())})
    batch = {
        "image": image,
        "index": torch.arange(len(sizes)),
        "size": torch.tensor(sizes),
        "original_size": torch.tensor(sizes),
        "label_map": label_map,
        "instances": instances,
    }
    if not mask.all():
        batch["mask"] = mask
    return batch, truth_maps, truth


def task_and_model(name, model="dgt_pico", classes=None, seed=0, **options):
    """A task with the narrowest heads, and its model with a small backbone of strides 4 to 32."""
    if classes is None:
        classes = ["background", *CLASSES] if name == "semantic-segmentation" else CLASSES
    task = create_task(name, classes=classes, **{"channels": 64 if name == "semantic-segmentation" else 32, **options})
    torch.manual_seed(seed)
    config = SimpleNamespace(name=model, options=SMALL[model], drop_path=0.0)
    return task, task.build_model(config, SimpleNamespace(classes=classes, channels=3))


def assert_answered_one_by_one(task, model, batch):
    """What is answered about each image of a padded batch is what is answered about it alone."""
    model.eval()
    assert "mask" in batch
    with torch.inference_mode():
        together = task.answers(task.predict(model, batch), batch)
        for row, (height, width) in enumerate(batch["size"].tolist()):
            one = {"image": batch["image"][row : row + 1, :, :height, :width], "size": batch["size"][row : row + 1],
                   "original_size": batch["original_size"][row : row + 1]}  # fmt: skip
            alone = task.answers(task.predict(model, one), one)[0]
            assert alone.keys() == together[row].keys()
            for key, value in alone.items():
                np.testing.assert_array_equal(together[row][key], value)
