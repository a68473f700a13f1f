"""`bench_op`: the check before the timing, the structure of the report, errors."""

import json
from collections.abc import Callable

import bench_ops
import pytest
import torch

from coterie.bench import BenchOp, Settings, bench_op, get_op
from coterie.bench import op as op_module
from coterie.bench.record import failed
from coterie.bench.verify import check_backward, check_forward

Register = Callable[[BenchOp], BenchOp]


def measure(op: BenchOp, settings: Settings, *directions: str, **changes: object) -> dict:
    cases = [op.case(tokens=24, head_dim=8)]
    return bench_op(
        op.name, cases, directions=directions or ["forward"], settings=settings, measure_memory=False, **changes
    )


def test_report_of_the_operation_itself(quick: Settings) -> None:
    op = get_op("dynamic_group")
    cases = [op.case(tokens=tokens, options={"top_k": 9, "groups": 4}) for tokens in (33, 70)]
    directions = ["forward", "forward+backward"]
    report = bench_op(
        op.name, cases, backends=["native", "reference"], directions=directions, settings=quick, measure_memory=False
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["schema"] == "coterie.bench/1"
    assert [(r["case"]["tokens"], r["direction"]) for r in report["results"]] == [
        (t, d) for t in (33, 70) for d in directions
    ]
    for result in report["results"]:
        names = [entry["name"] for entry in result["contenders"]]
        assert names == ["scaled_dot_product_attention", "native", "reference"]
        assert result["order"] == names * 2
        assert result["rounds"] >= 3
        assert result["tensor_bytes"] == 4 * 2 * result["case"]["tokens"] * 32 * 4
        base = result["contenders"][0]["seconds"]["median"]
        for entry in result["contenders"]:
            seconds = entry["seconds"]
            assert seconds["quartile_1"] <= seconds["median"] <= seconds["quartile_3"]
            assert len(seconds["samples"]) == result["rounds"]
            assert entry["ratio"] == pytest.approx(base / seconds["median"])
            assert entry["times_floor"] == pytest.approx(seconds["median"] / entry["floor_seconds"])
            assert entry["check"]["passed"]
            assert entry["check"]["error"] <= entry["check"]["budget"]


@pytest.mark.parametrize("wrong", [bench_ops.too_sharp, bench_ops.not_a_number], ids=lambda run: run.__name__)
def test_a_wrong_result_gets_no_time(wrong: Callable, register: Register, quick: Settings) -> None:
    op = register(bench_ops.make_op(bench_ops.plain, wrong))
    report = measure(op, quick)
    entries = {entry["name"]: entry for entry in report["results"][0]["contenders"]}
    assert "seconds" not in entries[wrong.__name__]
    assert "wrong result, not timed: output: error" in entries[wrong.__name__]["error"]
    assert "seconds" in entries["plain"]
    assert len(failed(report)) == 1


def test_a_wrong_gradient_counts_only_where_it_is_timed(register: Register, quick: Settings) -> None:
    op = register(bench_ops.make_op(bench_ops.wrong_gradient))
    forward, both = measure(op, quick, "forward", "forward+backward")["results"]
    assert "seconds" in forward["contenders"][1]
    assert "gradient of value" in next(e["error"] for e in both["contenders"] if e["name"] == "wrong_gradient")


def test_the_allowed_error_follows_the_dtype() -> None:
    op = bench_ops.make_op(bench_ops.plain)
    budgets = []
    for dtype in ("float64", "float32", "bfloat16"):
        case = op.case(tokens=24, dtype=dtype)
        check = check_forward(op, case, op.baseline, op.make_inputs(case))
        assert check.passed
        assert check_backward(op, case, op.baseline).passed
        budgets.append(check.budget)
    assert budgets[0] < 1e-6 * budgets[1] < 1e-6 * 1e-2 * budgets[2] * 1.0001


@pytest.mark.parametrize("tokens", [1, 2, 63])
def test_every_backend_passes_the_check_at_awkward_sizes(tokens: int) -> None:
    op = get_op("dynamic_group")
    case = op.case(tokens=tokens, heads=3, head_dim=20, batch=2, options={"top_k": 5, "groups": 7, "skew": 1.0})
    for name in ("native", "reference"):
        contender = op.backends(case, True)[name]
        assert not isinstance(contender, str)
        for check in (check_forward(op, case, contender, op.make_inputs(case)), check_backward(op, case, contender)):
            assert check.passed, f"{name}: {check}"


def test_one_that_breaks_down_does_not_stop_the_others(register: Register, quick: Settings) -> None:
    op = register(bench_ops.make_op(bench_ops.broken, bench_ops.plain, bench_ops.greedy))
    result = measure(op, quick)["results"][0]
    entries = {entry["name"]: entry for entry in result["contenders"]}
    assert entries["broken"]["error"] == "failed: RuntimeError: the kernel does not like this"
    assert "seconds" in entries["plain"]
    assert result["skipped"] == [{"name": "greedy", "reason": "out of memory"}]


def test_backends_that_cannot_run_are_left_out_with_the_reason(register: Register, quick: Settings) -> None:
    op = register(bench_ops.make_op(bench_ops.plain, gpu="it takes CUDA tensors, got cpu"))
    assert measure(op, quick)["results"][0]["skipped"] == [{"name": "gpu", "reason": "it takes CUDA tensors, got cpu"}]


def test_a_backend_asked_for_is_never_left_out(register: Register, quick: Settings) -> None:
    op = register(bench_ops.make_op(bench_ops.plain, gpu="it takes CUDA tensors, got cpu"))
    with pytest.raises(
        ValueError, match="backend 'gpu' of trial cannot run at 24 tokens: it takes CUDA tensors, got cpu"
    ):
        measure(op, quick, backends=["gpu"])
    with pytest.raises(ValueError, match=r"trial has no backend 'plane' \(did you mean plain\?\); it has plain, gpu"):
        measure(op, quick, backends=["plane"])


def test_nothing_that_runs_is_an_error(register: Register, quick: Settings) -> None:
    op = register(bench_ops.make_op(gpu="it takes CUDA tensors, got cpu"))
    with pytest.raises(ValueError, match="trial has no backend that runs here: it takes CUDA tensors"):
        measure(op, quick)


def test_auto_is_named_by_what_it_stands_for(register: Register, quick: Settings) -> None:
    op = register(bench_ops.make_op(bench_ops.plain))
    result = measure(op, quick, backends=["auto"])["results"][0]
    assert result["contenders"][1]["name"] == result["auto_backend"] == "plain"


def test_quadratic_memory_is_refused_before_it_hurts(quick: Settings) -> None:
    op = get_op("dynamic_group")
    with pytest.raises(ValueError, match=r"cannot run at 10000000 tokens: it would take about .* GiB of memory, and"):
        bench_op(op.name, [op.case(tokens=10_000_000)], backends=["reference"], settings=quick)


def test_wrong_direction_and_no_case() -> None:
    with pytest.raises(ValueError, match="unknown direction 'sideways'"):
        bench_op("global", [get_op("global").case(tokens=4)], directions=["sideways"])
    with pytest.raises(ValueError, match="no case to measure"):
        bench_op("global", [])


def test_an_interruption_keeps_what_was_measured(
    register: Register, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = register(bench_ops.make_op(bench_ops.plain))
    real, calls = op_module.measure_case, []

    def interrupted(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(op_module, "measure_case", interrupted)
    report = measure(op, quick, "forward", "forward+backward")
    assert report["interrupted"]
    assert len(report["results"]) == 1


def test_memory_is_told_in_units_of_the_tensors(
    register: Register, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = register(bench_ops.make_op(bench_ops.plain))
    jobs: list[dict] = []

    def child(target: str, arguments: dict, *, timeout: float) -> dict:
        jobs.append(arguments)
        return {"peak_extra_bytes": 3 * 4 * 2 * 24 * 8 * 4, "method": "a guess"}

    monkeypatch.setattr(op_module.memory, "measure_in_child", child)
    case = op.case(tokens=24, head_dim=8)
    result = bench_op(op.name, [case], settings=quick)["results"][0]
    assert [job["contender"] for job in jobs] == ["scaled_dot_product_attention", "plain"]
    assert all(entry["memory"]["per_tensor_bytes"] == 3.0 for entry in result["contenders"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(quick: Settings) -> None:
    op = get_op("dynamic_group")
    case = op.case(tokens=300, head_dim=64, dtype="bfloat16", device="cuda")
    report = bench_op(op.name, [case], directions=["forward", "forward+backward"], settings=quick)
    for result in report["results"]:
        for entry in result["contenders"]:
            assert "error" not in entry
            assert entry["memory"]["peak_extra_bytes"] > 0
