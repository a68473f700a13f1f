"""Dense tasks through the same engine: training, evaluation, prediction, resume, accumulation, centroids from data."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_runs import COUNTS, TASKS, dense, write_set
from dense_sets import scene, write_coco
from PIL import Image
from safetensors.torch import load_file

from coterie.engine import checkpoint, evaluate, load_config, predict, train
from coterie.engine.logs import read_events

SUMMARIES = {"semantic-segmentation": "miou", "object-detection": "ap", "instance-segmentation": "mask_ap"}


@pytest.fixture(scope="module", params=TASKS)
def run_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    train(dense(request.param, write_set(folder / "set", request.param), folder / "run"))
    return folder / "run"


def task_of(run_dir: Path) -> str:
    return load_config(run_dir / "config.yaml").task.name


def test_the_run_is_complete_and_remembers_its_target(run_dir: Path) -> None:
    task = task_of(run_dir)
    source = json.loads((run_dir / "source.json").read_text())
    assert source["target"] == ("label_map" if task == "semantic-segmentation" else "instances")
    assert "disc" in source["classes"]
    evals = [event for event in read_events(run_dir) if event["event"] == "eval"]
    assert [event["step"] for event in evals] == [2, 4]
    assert SUMMARIES[task] in evals[-1]
    assert ("loss" in evals[-1]) == (task == "semantic-segmentation")  # detectors have none in evaluation
    assert np.isfinite([event["loss"] for event in read_events(run_dir) if event["event"] == "train"]).all()


def test_a_later_evaluation_gives_the_figures_of_the_log(run_dir: Path) -> None:
    logged = [event for event in read_events(run_dir) if event["event"] == "eval"][-1]
    again = evaluate(run_dir, device="cpu")
    assert again.images == COUNTS["test"]
    assert again.figures == {name: pytest.approx(logged[name], abs=1e-6) for name in again.figures}
    with np.load(run_dir / "predictions.npz") as stored:
        assert set(stored.files) == set(again.samples)
        assert sorted(stored["indices"].tolist()) == stored["indices"].tolist()
        if task_of(run_dir) == "semantic-segmentation":
            assert stored["confusion"].shape == (COUNTS["test"], 3, 3)
            right = np.diagonal(stored["confusion"], axis1=1, axis2=2).sum()
            assert right / stored["confusion"].sum() == pytest.approx(logged["pixel_accuracy"])
        else:
            assert len(stored["boxes"]) == len(stored["scores"]) == len(stored["labels"]) == len(stored["indices"])


def test_answers_are_in_the_pixels_of_the_file(run_dir: Path, tmp_path: Path) -> None:
    Image.fromarray(scene(99)[0]).resize((50, 70)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good, bad = predict(run_dir, [tmp_path / "a.png", tmp_path / "bad.png"], device="cpu")
    assert bad.error
    assert good.error is None
    assert good.image.size == (50, 70)
    if "label_map" in good.answers:
        assert good.answers["label_map"].shape == (70, 50)
        return
    boxes = good.answers["boxes"]
    assert (boxes >= 0).all()
    assert (boxes <= [50, 70, 50, 70]).all()
    assert len(good.answers["scores"]) == len(boxes)
    if task_of(run_dir) == "instance-segmentation":
        assert good.answers["masks"].shape == (len(boxes), 70, 50)


def test_it_learns(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", "semantic-segmentation")
    plain = {"scale_jitter": [1.0, 1.0], "color_jitter": 0.0}
    changes = {"transform": plain, "train__epochs": 30, "optim__lr": 1e-2, "output__eval_every": 30}
    result = train(dense("semantic-segmentation", data, tmp_path / "run", **changes))
    assert result.metrics["pixel_accuracy"] > 0.91  # background alone gives 0.89
    assert result.metrics["miou"] > 0.4  # and 0.3


@pytest.mark.parametrize("task", ["semantic-segmentation", "instance-segmentation"])
def test_a_resumed_run_ends_as_the_unbroken_one(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_set(tmp_path / "set", task)
    train(dense(task, data, tmp_path / "unbroken"))
    saved = checkpoint.save

    def stop(*arguments: object) -> Path:
        path = saved(*arguments)
        raise KeyboardInterrupt(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train(dense(task, data, tmp_path / "broken"))
    train(dense(task, data, tmp_path / "broken"), resume=True)
    unbroken, broken = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "broken"))
    assert [name for name in unbroken if not torch.equal(unbroken[name], broken[name])] == []


@pytest.mark.parametrize("task", TASKS)
def test_mixed_precision_trains_and_answers(task: str, tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", task)
    curves = {}
    for precision in ("no", "bf16"):
        train(
            dense(
                task,
                data,
                tmp_path / precision,
                train={"precision": precision, "epochs": 2, "batch_size": 4, "device": "cpu"},
            )
        )
        curves[precision] = [event["loss"] for event in read_events(tmp_path / precision) if event["event"] == "train"]
    assert curves["bf16"] != curves["no"]
    assert curves["bf16"][0] == pytest.approx(curves["no"][0], rel=0.05)
    weights = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values() if w.is_floating_point())


def test_accumulation_takes_the_same_steps(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", "object-detection")
    for name, parts in (("whole", 1), ("parts", 2)):
        # one step without warm-up: batch normalisation sees the parts, so later steps may differ more
        train(dense("object-detection", data, tmp_path / name, train__epochs=1, train__accumulate=parts))
    first = [read_events(tmp_path / name)[0]["loss"] for name in ("whole", "parts")]
    assert first[0] == pytest.approx(first[1], rel=0.1)


def test_centroids_start_from_the_first_batch_of_padded_images(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", "object-detection")
    for init in ("random", "data"):
        changes = {"model__centroid_init": init, "train__epochs": 1, "optim__lr": 0.0}
        train(dense("object-detection", data, tmp_path / init, **changes))
    random, from_data = (load_file(tmp_path / name / "model.safetensors") for name in ("random", "data"))
    names = [name for name in random if name.endswith("centroids")]
    assert names
    assert all(not torch.allclose(random[name], from_data[name], atol=0.1) for name in names)


def test_other_data_is_matched_by_the_names_of_its_classes(run_dir: Path, tmp_path: Path) -> None:
    if task_of(run_dir) == "semantic-segmentation":
        pytest.skip("classes of label maps are matched by the data floor's own tests")
    other = write_coco(tmp_path / "other", {"train": 2, "test": 3})
    assert evaluate(run_dir, data=str(other), device="cpu").images == 3
    for split in ("train", "test"):
        path = other / split / "_annotations.coco.json"
        path.write_text(path.read_text().replace('"disc"', '"ring"'))
    with pytest.raises(ValueError, match="not trained on: ring"):
        evaluate(run_dir, data=str(other), device="cpu")


def test_masks_are_asked_for_before_anything_is_trained(tmp_path: Path) -> None:
    boxes = write_coco(tmp_path / "boxes", COUNTS, masks=False)
    with pytest.raises(ValueError, match="boxes only and instance-segmentation needs masks"):
        train(dense("instance-segmentation", boxes, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_open_fields_take_what_the_task_takes(tmp_path: Path) -> None:
    from coterie.engine.config import config_from_dict, with_task_defaults
    from coterie.tasks import task_class

    for task in (*TASKS, "classification"):
        defaults = task_class(task).defaults
        settled = with_task_defaults(config_from_dict({"task": {"name": task}}))
        assert settled.optim.lr == defaults["optim.lr"]
        assert settled.train.batch_size == defaults["train.batch_size"]
        given = with_task_defaults(config_from_dict({"task": {"name": task}, "optim": {"lr": 0.5}}))
        assert given.optim.lr == 0.5
    named = config_from_dict({"task": {"name": "object-detection"}})
    assert named.run_dir == Path("runs/digit-scenes-object-detection")


@pytest.mark.parametrize(("size", "name", "options"), [(128, "dgt_pico", {"stem_stride": 2}), (256, "dgt_tiny", {})])
def test_a_network_is_chosen_by_the_size_of_the_pictures(size: int, name: str, options: dict) -> None:
    from coterie.engine.config import config_from_dict
    from coterie.engine.inputs import open_source, settle_config

    values = {"task": {"name": "object-detection"}, "data": {"source": "digit-scenes"}}
    config = config_from_dict({**values, "transform": {"image_size": size}})
    model = settle_config(config, open_source(config)).model
    assert (model.name, model.options) == (name, options)
