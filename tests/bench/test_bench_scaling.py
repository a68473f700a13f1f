"""`bench_scaling`: what is measured, what is extrapolated, and where the lines cross."""

import json
import math
from collections.abc import Callable

import bench_ops
import pytest

from coterie.bench import BenchOp, Settings, bench_scaling, get_op
from coterie.bench.scaling import crossovers, growths

TOKENS = (16, 32, 64)


def test_all_is_measured_within_the_budget(quick: Settings) -> None:
    op = get_op("dynamic_group")
    cases = [op.case(tokens=tokens, options={"top_k": 4, "groups": 3}) for tokens in reversed(TOKENS)]
    report = bench_scaling(op.name, cases, backends=["native"], settings=quick, measure_memory=False)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert [result["case"]["tokens"] for result in report["results"]] == list(TOKENS)
    assert not any(entry.get("extrapolated") for result in report["results"] for entry in result["contenders"])
    assert set(report["crossover"]) == {"native"}
    assert set(report["growth"]) == {"scaled_dot_product_attention", "native"}


def test_beyond_the_budget_exact_attention_is_extrapolated_and_marked(
    register: Callable[[BenchOp], BenchOp], quick: Settings
) -> None:
    op = register(bench_ops.make_op(bench_ops.plain, growth=1))
    cases = [op.case(tokens=tokens) for tokens in TOKENS]
    report = bench_scaling(op.name, cases, budget=1e-9, settings=quick, measure_memory=False)
    exact = [result["contenders"][0] for result in report["results"]]
    ours = [result["contenders"][1] for result in report["results"]]
    assert [entry.get("extrapolated", False) for entry in exact] == [False, True, True]
    assert not any(entry.get("extrapolated") for entry in ours)  # linear: measured at every length
    seconds = [entry["seconds"]["median"] for entry in exact]
    assert seconds[1:] == pytest.approx([4 * seconds[0], 16 * seconds[0]])
    assert [entry["extrapolated_from_tokens"] for entry in exact[1:]] == [16, 16]
    for base, entry in zip(exact[1:], ours[1:], strict=True):
        assert entry["ratio_extrapolated"]
        assert entry["ratio"] == pytest.approx(base["seconds"]["median"] / entry["seconds"]["median"])
    assert not ours[0].get("ratio_extrapolated")
    assert report["growth"][exact[0]["name"]]["time"] is None  # one measurement has no slope


def synthetic(*points: tuple[int, float, float]) -> dict:
    """A report with (tokens, seconds of the baseline, seconds of ours)."""
    results = [
        {
            "case": {"tokens": tokens},
            "contenders": [
                {"name": "base", "seconds": {"median": base}, "ratio": 1.0},
                {
                    "name": "ours",
                    "seconds": {"median": ours},
                    "ratio": base / ours,
                    "memory": {"peak_extra_bytes": tokens},
                },
            ],
        }
        for tokens, base, ours in points
    ]
    return {"baseline": "base", "results": results}


def test_crossover_lies_between_two_lengths_on_the_logarithmic_scale() -> None:
    # base = (n/100)^2, ours = n/50: they meet at n = 200.
    points = [(n, (n / 100) ** 2, n / 50) for n in (64, 128, 256, 512)]
    assert crossovers(synthetic(*points))["ours"] == pytest.approx(200)


def test_crossover_of_one_that_always_or_never_wins() -> None:
    assert crossovers(synthetic((64, 2.0, 1.0), (128, 8.0, 2.0)))["ours"] == 64
    assert crossovers(synthetic((64, 1.0, 2.0), (128, 1.0, 2.0)))["ours"] is None
    assert crossovers(synthetic((64, 2.0, 1.0), (128, 1.0, 2.0)))["ours"] is None  # it wins only below


def test_growth_is_the_slope_of_the_last_two() -> None:
    found = growths(synthetic((64, 1.0, 1.0), (128, 4.0, 2.0), (512, 64.0, 8.0)))
    assert found["base"]["time"] == pytest.approx(2.0)
    assert found["ours"]["time"] == pytest.approx(1.0)
    assert found["ours"]["memory"] == pytest.approx(1.0)
    assert found["base"]["memory"] is None
    assert math.isclose(2.0, found["base"]["time"] or 0.0)


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        ((64,), {}, "at least two different numbers of tokens"),
        ((64, 64), {}, "at least two different numbers of tokens"),
        ((32, 64), {"budget": 0.0}, "budget must be a positive number of seconds"),
        ((32, 64), {"direction": "backward"}, "unknown direction 'backward'"),
        ((32, 64), {"backends": ["nativ"]}, "has no backend 'nativ'"),
    ],
)
def test_wrong_arguments(tokens: tuple[int, ...], changes: dict, message: str) -> None:
    op = get_op("dynamic_group")
    with pytest.raises(ValueError, match=message):
        bench_scaling(op.name, [op.case(tokens=n) for n in tokens], measure_memory=False, **changes)
