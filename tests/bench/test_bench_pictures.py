"""Tables and pictures of made-up reports: what is failed, extrapolated or interrupted looks so."""

import io
from pathlib import Path

import pytest
import torch

from coterie.bench import Settings
from coterie.bench.console import Progress, megabytes, number, seconds
from coterie.bench.plot import draw, save_plot
from coterie.bench.record import new_report, save_report
from coterie.bench.table import print_report


def entry(name: str, median: float, ratio: float, **more: object) -> dict:
    figures = {
        "median": median,
        "quartile_1": median * 0.9,
        "quartile_3": median * 1.2,
        "precision": 0.01,
        "samples": [median],
    }
    memory = {"peak_extra_bytes": 3 * 2**20, "method": "a ruler", "per_tensor_bytes": 1.5}
    return {
        "name": name,
        "seconds": figures,
        "ratio": ratio,
        "flops": 100 if name == "base" else 10,
        "flops_per_second": 1e9,
        "times_floor": 2.0,
        "memory": memory,
    } | more


def report(kind: str = "op") -> dict:
    made = new_report(kind, "trial", "base", torch.device("cpu"), Settings())
    guess = {"extrapolated": True, "ratio_extrapolated": True, "flops_per_second": None, "times_floor": None}
    for tokens in (64, 128):
        base = entry("base", 1e-3 * tokens, 1.0)
        if kind == "scaling" and tokens == 128:
            base |= {"seconds": {"median": 0.5}, **guess}
            del base["memory"]
        ours = entry("ours", 2e-5, 50.0)
        case = {"tokens": tokens, "batch": 1, "heads": 2, "head_dim": 8, "dtype": "float32", "options": {"top_k": 5}}
        made["results"].append(
            {"case": case, "direction": "forward", "skipped": [], "contenders": [base, ours], "tensor_bytes": 4096}
            | {"rounds": 7, "stopped_by": "precision", "auto_backend": "ours"}
        )
    return made


def printed(made: dict) -> str:
    stream = io.StringIO()
    print_report(made, stream)
    return stream.getvalue()


def test_table() -> None:
    text = printed(report())
    assert "64 tokens, forward: batch 1, 2 heads of 8, float32, top_k 5" in text
    assert "arithmetic alone would allow 10.0x" in text
    assert "7 alternating rounds, stopped by precision; medians known to 1.0%" in text
    assert "by a ruler" in text
    assert "20.0 us" in text
    assert "50.0x" in text


def test_extrapolated_rows_are_marked() -> None:
    text = printed(report("scaling"))
    assert "base (extrapolated)  ~500 ms" in text


def test_failed_and_skipped_rows_have_no_time() -> None:
    made = report()
    made["results"][0]["contenders"][1] = {"name": "ours", "error": "wrong result, not timed: output"}
    made["results"][0]["skipped"] = [{"name": "gpu", "reason": "no GPU"}]
    made["interrupted"] = True
    text = printed(made)
    row = next(line for line in text.splitlines() if line.startswith("ours"))
    assert row.split() == ["ours", "failed", *["-"] * 6]
    assert "  ours: wrong result, not timed: output" in text
    assert "gpu left out: no GPU" in text
    assert "interrupted" in text


def test_a_terminal_gets_a_drawn_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    print_report(report(), stream)
    assert "┃" in stream.getvalue()
    assert "scaled" not in stream.getvalue()


@pytest.mark.parametrize("kind", ["op", "scaling"])
def test_picture(kind: str, tmp_path: Path) -> None:
    figure = draw(report(kind))
    assert figure is not None
    assert len(figure.axes) == 2
    path = save_plot(report(kind), tmp_path / "picture.png")
    assert path is not None
    assert path.stat().st_size > 5000


def test_scaling_picture_is_logarithmic_and_tells_guesses_apart() -> None:
    figure = draw(report("scaling"))
    assert figure is not None
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    labels = axes.get_legend_handles_labels()[1]
    assert {"base", "ours", "base, extrapolated"} == set(labels)


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    made = report()
    made["results"] = []
    assert save_plot(made, tmp_path / "picture.png") is None
    assert not (tmp_path / "picture.png").exists()


def test_file_names_carry_the_conditions(tmp_path: Path) -> None:
    path = save_report(report(), tmp_path)
    kind, subject, device, dtype, _ = path.stem.split("_")
    assert (kind, subject, device, dtype) == ("op", "trial", "cpu", "float32")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (2.5e-7, "0.25 us"), (1.234e-2, "12.3 ms"), (2.0, "2.00 s"), (4321.0, "4,321 s")]
)
def test_seconds(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_units() -> None:
    assert megabytes(3 * 2**19) == "1.50 MiB"
    assert megabytes(None) == "-"
    assert number(0.0, "x") == "0x"


def test_progress_is_lines_on_a_pipe_and_silent_when_asked() -> None:
    loud, quiet = io.StringIO(), io.StringIO()
    with Progress(loud) as progress:
        progress.stage("checking")
    Progress(quiet, silent=True).stage("checking")
    assert loud.getvalue() == "bench: checking\n"
    assert quiet.getvalue() == ""
