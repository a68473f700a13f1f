"""`coterie bench`: table on standard output, progress on standard error, JSON and picture in the folder, one line per
error."""

import json
from collections.abc import Callable
from pathlib import Path

import bench_ops
import pytest

from coterie.bench import BenchOp
from coterie.cli import main

QUICK = ("--no-memory", "--precision", "50", "--time-limit", "0.1", "--device", "cpu", "--threads", "1")


def run(folder: Path, *arguments: str) -> int:
    return main(["bench", *arguments, *QUICK, "--output", str(folder)])


def files(folder: Path) -> tuple[dict, Path]:
    (figures,) = folder.glob("*.json")
    (picture,) = folder.glob("*.png")
    assert figures.stem == picture.stem
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not [path for path in folder.iterdir() if path.suffix not in (".json", ".png")]
    return json.loads(figures.read_text()), figures


def test_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ("--tokens", "40", "90", "--groups", "4", "--top-k", "8")
    arguments = ("op", "dynamic_group", *shapes, "--backends", "native", "--forward", "--backward")
    assert run(tmp_path / "new", *arguments) == 0
    out, err = capsys.readouterr()
    report, path = files(tmp_path / "new")
    assert len(report["results"]) == 4
    assert report["command"].startswith("coterie bench op dynamic_group --tokens 40 90")
    assert path.name.startswith("op_dynamic-group_cpu_float32_20")
    assert "40 tokens, forward: batch 1, 2 heads of 32, float32, groups 4, top_k 8" in out
    assert "scaled_dot_product_attention" in out
    assert "arithmetic alone would allow" in out
    assert "\x1b" not in out  # plain on a pipe
    assert "bench: dynamic_group, 40 tokens, forward: checking native" in err
    assert str(path) in err


def test_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "model", "test_resnet", "test_vit", "--size", "32", "32x64", "--baseline", "test_resnet") == 0
    report, path = files(tmp_path)
    assert [result["case"]["size"] for result in report["results"]] == [32, [32, 64]]
    assert report["baseline"] == "test_resnet"
    assert "test-resnet-test-vit" in path.name
    assert "32x64 pixels, forward: batch 1, float32" in capsys.readouterr().out


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("scaling", "dynamic_group", "--tokens", "16", "32", "--top-k", "4", "--backends", "native")
    assert run(tmp_path, *arguments, "--budget", "1e-9") == 0
    report, _ = files(tmp_path)
    assert report["settings"]["budget"] == 1e-9
    out = capsys.readouterr().out
    assert "scaled_dot_product_attention (extrapolated)  ~" in out
    assert "native is faster than scaled_dot_product_attention" in out


def test_a_wrong_contender_ends_with_1_and_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], register: Callable[[BenchOp], BenchOp]
) -> None:
    register(bench_ops.make_op(bench_ops.too_sharp))
    assert run(tmp_path, "op", "trial", "--tokens", "24") == 1
    out, err = capsys.readouterr()
    assert "too_sharp: wrong result, not timed: output: error" in out
    assert "coterie bench: error: 24 tokens, forward, too_sharp: wrong result" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("op", "dynamic_grup", "--tokens", "8"), "unknown operation 'dynamic_grup' (did you mean dynamic_group?)"),
        (("op", "dynamic_group", "--tokens", "0"), "tokens must be at least 1, got 0"),
        (("op", "dynamic_group", "--tokens", "8", "--backends", "quick"), "dynamic_group has no backend 'quick'"),
        (("op", "global", "--tokens", "8", "--top-k", "3"), "global has no option 'top_k'"),
        (("op", "dynamic_group", "--tokens", "8", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("model", "test_vitt"), "unknown model 'test_vitt'"),
        (("scaling", "dynamic_group", "--tokens", "8"), "at least two different numbers of tokens"),
    ],
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "none", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("coterie bench: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wrong", [("--device", "toaster"), ("--device", "cuda:99"), ("--threads", "0")])
def test_wrong_machine(wrong: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "op", "global", "--tokens", "8", "--output", str(tmp_path), *wrong]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_names_operations_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "op", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "dynamic_group, global" in out
    assert "--top-k" in out
