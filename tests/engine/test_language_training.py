"""Language models through the engine: training, evaluation, resume in the middle of an epoch, several processes."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from language_run import language, write_prose
from safetensors.torch import load_file

from coterie.engine import checkpoint, evaluate, load_run, train
from coterie.engine.logs import read_events
from coterie.engine.loop import Trainer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prose(tmp_path_factory.mktemp("prose") / "prose.txt")


@pytest.fixture(scope="module")
def unbroken(prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("language") / "unbroken"
    train(language(run_dir, prose, optim__ema_decay=0.9, output__checkpoint_every=5))
    return run_dir


def events(run_dir: Path, kind: str) -> list[dict]:
    return [event for event in read_events(run_dir) if event["event"] == kind]


def without_clock(run_dir: Path) -> list[dict]:
    return [{key: value for key, value in event.items() if key != "tokens_per_s"} for event in read_events(run_dir)]


def everything(run_dir: Path) -> dict[str, bytes]:
    last = checkpoint.latest(run_dir / "checkpoints")
    assert last is not None
    names = (*last.glob("*.safetensors"), run_dir / "model.safetensors", run_dir / "tokenizer.json")
    return {path.name + str(path.parent == last): path.read_bytes() for path in names}


def test_a_run_learns_and_says_so(unbroken: Path) -> None:
    losses = [event["loss"] for event in events(unbroken, "train")]
    assert losses[-1] < 0.8 * losses[0]
    assert all(event["tokens_per_s"] > 0 for event in events(unbroken, "train"))
    (size,) = events(unbroken, "model")
    model = load_run(unbroken).model
    assert size["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < size["parameters_without_embeddings"] < size["parameters"]
    assert size["flops_per_token"] > 6 * size["parameters_without_embeddings"]
    for event in events(unbroken, "eval"):
        assert event["split"] == "validation"
        assert event["perplexity"] == pytest.approx(math.exp(event["loss"]))
        assert len(event["sample"]) >= 12
    (test,) = events(unbroken, "test")
    assert test["bits_per_byte"] == test["bits_per_character"]  # it is plain ASCII


def test_evaluation_gives_the_figures_of_the_log_over_the_text_itself(unbroken: Path, prose: Path) -> None:
    (logged,) = events(unbroken, "test")
    found = evaluate(unbroken)
    assert found.figures == {name: pytest.approx(logged[name], rel=1e-6) for name in found.figures}
    run = load_run(unbroken)
    sizes = run.source.text.splits["test"]
    nats = found.samples["nats"].sum()
    assert found.figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes["bytes"])
    assert found.figures["loss"] == pytest.approx(nats / (sizes["tokens"] - 1))
    np.testing.assert_allclose(np.load(unbroken / "predictions.npz")["nats"], found.samples["nats"], rtol=1e-5)
    other = evaluate(unbroken, data=f"text:{prose}?validation=0&test=0.5")
    assert other.figures["loss"] != found.figures["loss"]


def test_more_context_makes_evaluation_better(unbroken: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir)
    values = json.loads((run_dir / "source.json").read_text())
    values["text"]["eval_stride"] = 8
    (run_dir / "source.json").write_text(json.dumps(values))
    strided, plain = evaluate(run_dir), evaluate(unbroken)
    assert strided.samples["tokens"].sum() == plain.samples["tokens"].sum()
    assert strided.images > 3 * plain.images
    assert strided.figures["loss"] < plain.figures["loss"]


def test_the_best_weights_are_those_of_the_smallest_loss(prose: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # The learning rate rises until it is far too high, so the first evaluation is better than the last.
    changes = {"optim__lr": 3.0, "optim__clip_norm": 0.0, "schedule__warmup_epochs": 3.0, "train__epochs": 3}
    train(language(run_dir, prose, **changes))
    losses = {event["step"]: event["loss"] for event in events(run_dir, "eval")}
    best = min(losses, key=losses.__getitem__)
    assert best != max(losses)
    assert load_run(run_dir, "best").step == best


def test_a_run_broken_in_the_middle_of_an_epoch_ends_bit_for_bit_the_same(
    unbroken: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = language(tmp_path / "broken", prose, optim__ema_decay=0.9, output__checkpoint_every=5)
    step, original = 8, Trainer._train_step

    def until(trainer: Trainer, batch: dict) -> None:
        if trainer.step == step:
            raise RuntimeError("pulled the plug")
        original(trainer, batch)

    monkeypatch.setattr(Trainer, "_train_step", until)
    for step in (8, 17):
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(config, resume=step > 8)
        torch.manual_seed(999)  # nothing may depend on what an earlier start left behind
    monkeypatch.undo()
    last = checkpoint.latest(tmp_path / "broken" / "checkpoints")
    assert last is not None
    assert last.name == "step-00000015"
    train(config, resume=True)
    assert everything(tmp_path / "broken") == everything(unbroken)
    assert without_clock(tmp_path / "broken") == without_clock(unbroken)


def test_evaluations_within_an_epoch_come_when_asked_and_change_no_weight(
    unbroken: Path, prose: Path, tmp_path: Path
) -> None:
    often = tmp_path / "often"
    train(language(often, prose, optim__ema_decay=0.9, output__eval_every=0.4))
    steps = events(unbroken, "eval")[0]["step"]  # of an epoch
    every, last = round(0.4 * steps), events(unbroken, "eval")[-1]["step"]
    seen = {event["step"]: event for event in events(often, "eval")}
    assert list(seen) == sorted({*range(every, last, every), last})
    assert seen[every]["epoch"] == pytest.approx(every / steps, abs=1e-3)
    assert seen[last]["loss"] == events(unbroken, "eval")[-1]["loss"]
    assert checkpoint.latest(often / "checkpoints").name == f"step-{last:08d}"
    assert (often / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


def test_a_trained_tokenizer_stays_with_its_run(prose: Path, tmp_path: Path) -> None:
    text = shutil.copy(prose, tmp_path / "text.txt")
    config = language(tmp_path / "run", text, text__tokenizer="bpe", text__vocab_size=300, train__epochs=1)
    train(config)
    kept = (tmp_path / "run" / "tokenizer.json").read_bytes()
    Path(text).write_text(Path(text).read_text() * 2)  # the text grows; what the tokens mean must not change
    train(config, resume=True)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == kept
    assert evaluate(tmp_path / "run", data=f"text:{prose}").figures["bits_per_byte"] > 0
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("changes", [{"train__accumulate": 3}, {"model__name": "llama", "model__options": {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}, {"train__precision": "bf16"}])  # fmt: skip
def test_other_ways_to_train(unbroken: Path, prose: Path, tmp_path: Path, changes: dict) -> None:
    train(language(tmp_path / "run", prose, train__epochs=1, **changes))
    losses = [event["loss"] for event in events(tmp_path / "run", "train")]
    assert losses[-1] < losses[0]
    if "train__accumulate" in changes:  # the same step in parts
        assert losses[0] == pytest.approx(events(unbroken, "train")[0]["loss"], rel=1e-5)


def test_text_that_is_too_short_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short " * 6)
    with pytest.raises(ValueError, match=r"the training text has \d+ tokens, too few for rows of 32"):
        train(language(tmp_path / "run", tmp_path / "short.txt"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_the_same(unbroken: Path, prose: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "killing_language.py"), str(tmp_path / "killed"), str(prose), "7", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed after step") == 2
    assert everything(tmp_path / "killed") == everything(unbroken)
    assert without_clock(tmp_path / "killed") == without_clock(unbroken)


@pytest.mark.slow
def test_two_processes_train_as_one(unbroken: Path, prose: Path, tmp_path: Path) -> None:
    command = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(HERE / "two_ranks_language.py"), str(tmp_path / "two"), str(prose),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = events(unbroken, "test")[0], events(tmp_path / "two", "test")[0]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    first, second = (load_file(folder / "model.safetensors") for folder in (unbroken, tmp_path / "two"))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-2, atol=1e-3)
