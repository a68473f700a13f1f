"""What a run does and leaves: the folder, evaluation, the moving average, accumulation, precision."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import tiny

from coterie.engine import checkpoint, evaluate, load_config, load_run, train
from coterie.engine.logs import read_events


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


def losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in read_events(run_dir) if event["event"] == "train"]


def test_run_folder_is_complete(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "predictions.npz",
        "source.json",
        "tensorboard",
    }
    assert load_config(finished_run / "config.yaml").model.name == "dgt_pico"
    assert json.loads((finished_run / "environment.json").read_text())["torch"] == torch.__version__
    assert list((finished_run / "tensorboard").iterdir())


def test_log_has_every_event_once(finished_run: Path) -> None:
    events = read_events(finished_run)
    train_steps = [event["step"] for event in events if event["event"] == "train"]
    assert train_steps == [2, 4, 5, 6, 8, 10]  # every 2 steps and at the end of each epoch of 5
    evals = [event for event in events if event["event"] == "eval"]
    assert [(event["step"], event["epoch"]) for event in evals] == [(5, 1), (10, 2)]
    assert all(
        {"loss", "lr", "images_per_s", "grad_norm"} <= event.keys() for event in events if event["event"] == "train"
    )
    assert {"loss", "accuracy", "macro_accuracy", "top5_accuracy", "split"} <= evals[-1].keys()


def test_predictions_agree_with_the_figures_and_with_a_later_evaluation(finished_run: Path) -> None:
    stored = np.load(finished_run / "predictions.npz")
    assert stored["probabilities"].dtype == np.float16
    assert stored["probabilities"].shape == (359, 10)
    assert stored["indices"].tolist() == list(range(359))
    accuracy = read_events(finished_run)[-1]["accuracy"]
    assert (stored["probabilities"].argmax(1) == stored["labels"]).mean() == pytest.approx(accuracy, abs=0.005)
    again = evaluate(finished_run, device="cpu")
    assert again.figures["accuracy"] == pytest.approx(accuracy)
    np.testing.assert_array_equal(again.samples["labels"], stored["labels"])
    np.testing.assert_allclose(again.samples["probabilities"], stored["probabilities"], atol=2e-3)


def test_final_weights_are_the_moving_average_buffers_included(finished_run: Path) -> None:
    last = checkpoint.latest(finished_run / "checkpoints")
    plain, average = checkpoint.read_tensors(last, "model"), checkpoint.read_tensors(last, "average")
    final = weights(finished_run)
    assert final.keys() == average.keys() == plain.keys()
    assert all(torch.equal(final[name], average[name]) for name in final)
    for part in ("centroids", "running_mean", "head.fc.weight"):
        name = next(name for name in final if name.endswith(part))
        assert not torch.equal(final[name], plain[name])


def test_loaded_run_answers_in_eval_mode(finished_run: Path) -> None:
    run = load_run(finished_run)
    assert not run.model.training
    assert run.source.channels == 1
    assert run.model(torch.zeros(2, 1, *run.source.transform.image_size)).shape == (2, 10)
    assert load_run(finished_run, weights="best").step in (5, 10)


def test_centroids_move_with_the_learning_rate(tmp_path: Path) -> None:
    for name, rate in (("still", 0.0), ("moving", 100.0)):
        options = {**tiny(tmp_path).model.options}
        options["attention_options"] = {"groups": 4, "top_k": 8, "centroid_rate": rate}
        train(tiny(tmp_path / name, model__options=options, train__epochs=1))
    start = load_run(tmp_path / "still").model.stages[0].blocks[0].attn.centroids
    moved = load_run(tmp_path / "moving").model.stages[0].blocks[0].attn.centroids
    assert not torch.allclose(start, moved, atol=1e-3)
    torch.testing.assert_close(moved.norm(dim=-1), torch.ones(moved.shape[:-1]))


def test_centroids_from_data_differ_from_random_ones(tmp_path: Path) -> None:
    for init in ("random", "data"):
        train(tiny(tmp_path / init, model__centroid_init=init, train__epochs=1))
    random, data = weights(tmp_path / "random"), weights(tmp_path / "data")
    name = next(name for name in random if name.endswith("centroids"))
    assert not torch.allclose(random[name], data[name], atol=0.1)


def test_training_is_repeatable_and_accumulation_changes_only_rounding(tmp_path: Path) -> None:
    # Without batch normalisation, whose statistics are those of a part.
    model = {
        "model__name": "vit_tiny_patch16_224",
        "model__options": {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    }
    train(tiny(tmp_path / "whole", **model))
    train(tiny(tmp_path / "again", **model))
    train(tiny(tmp_path / "parts", **model, train__accumulate=3))
    assert losses(tmp_path / "whole") == losses(tmp_path / "again")
    assert all(
        torch.equal(a, b) for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "again").values())
    )
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_workers_change_nothing(tmp_path: Path) -> None:
    train(tiny(tmp_path / "none", train__epochs=1))
    train(tiny(tmp_path / "two", train__epochs=1, data__workers=2))
    assert losses(tmp_path / "none") == losses(tmp_path / "two")


def test_bf16_with_mixup_and_drop_path_trains(tmp_path: Path) -> None:
    changes = {"train__precision": "bf16", "augment__mixup": 0.4, "augment__cutmix": 1.0, "model__drop_path": 0.1}
    result = train(tiny(tmp_path / "run", **changes))
    assert result.step == 10
    assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path / "run").values())
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_checkpoints_kept_are_the_last_ones_and_the_best(tmp_path: Path) -> None:
    train(
        tiny(tmp_path / "run", train__epochs=4, output__keep=1, optim__lr=0.0)
    )  # nothing learned: the first stays best
    kept = [path.name for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept[-1] == "step-00000020"
    best = checkpoint.read_state(checkpoint.latest(tmp_path / "run" / "checkpoints"))["best"]["step"]
    assert kept == sorted({f"step-{best:08d}", "step-00000020"})
