"""`coterie generate`, `eval` and `inspect` on a small language model."""

import json
import sys
from pathlib import Path

import pytest

from coterie.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from language_run import language, write_prose


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    from coterie.engine import train

    folder = tmp_path_factory.mktemp("generate")
    train(language(folder / "run", write_prose(folder / "prose.txt"), train__epochs=1))
    return str(folder / "run")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 2
    return capsys.readouterr().err


def test_samples_are_functions_of_the_seed(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", run, "--prompt", "the ", "--max-new-tokens", "40", "--device", "cpu")
    first = said(capsys, *command)
    assert first.startswith("the ")
    assert said(capsys, *command) == first
    assert said(capsys, *command, "--stream") == first
    lines = said(capsys, *command, "--num-samples", "2", "--json").splitlines()
    texts = [json.loads(line) for line in lines]
    assert [entry["seed"] for entry in texts] == [0, 1]
    assert texts[0]["text"] + "\n" == first
    assert texts[1]["text"] != texts[0]["text"]
    greedy = [said(capsys, *command, "--temperature", "0", "--seed", seed) for seed in ("1", "2")]
    assert greedy[0] == greedy[1]
    only_one = said(capsys, *command, "--top-k", "1", "--temperature", "1")
    assert only_one == greedy[0]


def test_a_prompt_from_a_file_and_none(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompt.txt").write_text("a quick")
    assert said(capsys, "generate", run, "--prompt-file", str(tmp_path / "prompt.txt")).startswith("a quick")
    assert said(capsys, "generate", run, "--max-new-tokens", "5").strip()


def test_wrong_arguments_are_one_line(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-new-tokens: got 0, takes 1 or more" in refused(capsys, "generate", run, "--max-new-tokens", "0")
    assert "--temperature: got -1.0, takes 0 or more" in refused(capsys, "generate", run, "--temperature=-1")
    assert "--top-p: got 1.5" in refused(capsys, "generate", run, "--top-p", "1.5")
    assert "holds no run" in refused(capsys, "generate", str(tmp_path))
    assert "no file" in refused(capsys, "generate", run, "--prompt-file", str(tmp_path / "nothing"))


def test_eval_and_inspect(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "eval", run, "--device", "cpu")
    assert "perplexity" in out
    assert "bits_per_byte" in out
    figures = json.loads(said(capsys, "eval", run, "--json", "--split", "train"))
    assert figures["loss"] > 0
    out = said(capsys, "inspect", run, "the quick fox", "--out", str(tmp_path))
    assert "layer 2:  pre " in out
    assert "fox" not in out
    assert (tmp_path / "index.html").is_file()


def test_the_report_of_a_run(run: str) -> None:
    from coterie.inspect.report import write_report

    page = write_report(run).read_text()
    for words in ("bits per byte", "Samples", "characters", "Run it again", "tokens/s", "parameters"):
        assert words in page
    assert "NaN" not in page
