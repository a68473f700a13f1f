"""Stands in for what the data and tasks floors are about to provide. To be deleted."""

from typing import Any

import torch


def task_class(name: str) -> Any:
    import coterie.tasks as tasks

    if hasattr(tasks, "task_class"):
        return tasks.task_class(name)
    tasks.create_task(name, classes=["a", "b"])

    class Interim:
        target = "class"
        defaults = {"optim.lr": 1e-3, "train.epochs": 10, "train.batch_size": 64}  # noqa: RUF012

    return Interim


def build_pipeline(source: Any, config: Any, target: str, train: bool) -> Any:
    import coterie.data as data

    if hasattr(data, "build_pipeline"):
        return data.build_pipeline(source, config, target, train)
    return data.build_transforms(source, config, train)


def batch_of(pipeline: Any, images: list) -> dict:
    if hasattr(pipeline, "collate"):
        return pipeline.collate([pipeline(image, None) for image in images])
    return {"image": torch.stack([pipeline(image) for image in images])}


def open_data(spec: str, target: str, image_size: Any) -> Any:
    import inspect

    import coterie.data as data

    if "target" in inspect.signature(data.open_data).parameters:
        return data.open_data(spec, target=target, image_size=image_size)
    return data.open_data(spec, image_size=image_size)


def predict(task: Any, model: Any, batch: dict) -> Any:
    return task.predict(model, batch) if hasattr(task, "predict") else model(batch["image"])


def answers(task: Any, output: Any, batch: dict) -> Any:
    return task.answers(output, batch) if hasattr(task, "answers") else task.describe(output)
