"""`coterie bench op`: implementations of one operation against exact attention, at given shapes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from coterie.bench import memory
from coterie.bench.conditions import matmul_rate, synchronizer
from coterie.bench.console import Progress
from coterie.bench.record import first_line, is_out_of_memory, new_report, timing_record
from coterie.bench.registry import BenchOp, Case, Contender, Inputs, get_op, suggest
from coterie.bench.timing import DEFAULT_SETTINGS, Alternation, Settings, alternate
from coterie.bench.verify import backward_call, check_backward, check_forward

_SHARE_OF_FREE_MEMORY = 0.8


def bench_op(
    name: str,
    cases: Sequence[Case],
    *,
    backends: Sequence[str] | None = None,
    directions: Sequence[str] = ("forward",),
    settings: Settings = DEFAULT_SETTINGS,
    measure_memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an operation's backends against its baseline.

    Args:
        name: a name of `list_ops()`.
        cases: shapes, made by `get_op(name).case(...)`.
        backends: names to measure; None takes those that can run. One that was asked for and cannot run is an error.
        directions: out of "forward" and "forward+backward".
        settings: when to stop timing.
        measure_memory: also measure peak extra memory (on the CPU one process per contender and case).
        progress: told what goes on; None keeps silent.

    Returns:
        The report, JSON-ready (docs/benchmarking.md lists its fields).

    Raises:
        ValueError: an unknown name, backend or direction; a backend that cannot run; no case.
    """
    op, progress = get_op(name), progress or Progress(silent=True)
    check_directions(directions)
    if not cases:
        raise ValueError("no case to measure: give at least one number of tokens")
    for case in cases:
        for direction in directions:
            choose_contenders(op, case, direction, backends)  # a wrong name stops the run before the first measurement
    report = new_report("op", name, op.baseline.name, cases[0].torch_device, settings)
    try:
        for case in cases:
            for direction in directions:
                contenders, skipped = choose_contenders(op, case, direction, backends)
                report["results"].append(
                    measure_case(op, case, direction, contenders, skipped, settings, measure_memory, progress)
                )
    except KeyboardInterrupt:
        report["interrupted"] = True
    return report


def check_directions(directions: Iterable[str]) -> None:
    """Raises ValueError for anything but "forward" and "forward+backward"."""
    for direction in directions:
        if direction not in ("forward", "forward+backward"):
            raise ValueError(f"unknown direction {direction!r}; it takes 'forward' and 'forward+backward'")


def choose_contenders(
    op: BenchOp, case: Case, direction: str, backends: Sequence[str] | None
) -> tuple[list[Contender], list[dict[str, str]]]:
    """The contenders of a case, baseline first, and those left out with the reason.

    Raises:
        ValueError: a backend asked for is unknown or cannot run; or none is left.
    """
    found = op.backends(case, direction != "forward")
    chosen, skipped = [op.baseline], []
    for name in list(dict.fromkeys(backends)) if backends else [n for n in op.default_backends if n in found]:
        if name == "auto":
            name = op.auto(case, direction != "forward")
        if name not in found:
            raise ValueError(
                f"{op.name} has no backend {name!r}{suggest(name, list(found))}; it has {', '.join(found)}"
            )
        backend = found[name]
        reason = backend if isinstance(backend, str) else _too_big(backend, case)
        if reason is None and not isinstance(backend, str):
            chosen.append(backend)
        elif backends:
            raise ValueError(f"backend {name!r} of {op.name} cannot run at {case.tokens} tokens: {reason}")
        else:
            skipped.append({"name": name, "reason": str(reason)})
    if len(chosen) == 1:
        raise ValueError(f"{op.name} has no backend that runs here: {'; '.join(s['reason'] for s in skipped)}")
    return chosen, skipped


def measure_case(
    op: BenchOp,
    case: Case,
    direction: str,
    contenders: Sequence[Contender],
    skipped: list[dict[str, str]],
    settings: Settings,
    measure_memory: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Check, time and weigh contenders on one case; the entry of the report's "results"."""
    backward = direction != "forward"
    label = f"{op.name}, {case.tokens} tokens, {direction}"
    inputs = op.make_inputs(case)
    result: dict[str, Any] = {
        "case": case.as_dict(),
        "direction": direction,
        "auto_backend": op.auto(case, backward),
        "tensor_bytes": _tensor_bytes(op, inputs),
        "skipped": list(skipped),
        "contenders": [],
    }
    calls: dict[str, Callable[[], object]] = {}
    checks: dict[str, dict[str, Any]] = {}
    running: list[Contender] = []
    for contender in contenders:
        progress.stage(f"{label}: checking {contender.name}")
        call = make_call(op, contender, inputs, backward)
        try:
            check = check_forward(op, case, contender, inputs)
            if backward and check.passed:
                check = max(
                    check, check_backward(op, case, contender), key=lambda c: (not c.passed, c.error / c.budget)
                )
            if backward and case.torch_device.type != "cpu":
                call()  # the forward pass fitted into the device's memory; the backward pass may not
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                result["skipped"].append({"name": contender.name, "reason": "out of memory"})
            else:
                result["contenders"].append({"name": contender.name, "error": f"failed: {first_line(error)}"})
            continue
        checks[contender.name] = check.as_dict()
        if check.passed:
            running.append(contender)
            calls[contender.name] = call
        else:
            wrong = {"name": contender.name, "error": f"wrong result, not timed: {check}", "check": check.as_dict()}
            result["contenders"].append(wrong)
    if not calls:
        return result

    rate = matmul_rate(case.torch_device, case.torch_dtype)
    alternation = alternate(
        calls,
        settings,
        synchronize=synchronizer(case.torch_device),
        on_round=progress.rounds(label, settings),
    )
    rate = max(rate, matmul_rate(case.torch_device, case.torch_dtype))
    result |= {
        "rounds": alternation.rounds,
        "stopped_by": alternation.stopped_by,
        "order": alternation.order[: 2 * len(calls)],
        "matmul_flops_per_second": rate,
    }
    for contender in running:
        entry = timing_record(contender.name, alternation, op.baseline.name, contender.flops(case, backward), rate)
        entry["check"] = checks[contender.name]
        if measure_memory:
            progress.stage(f"{label}: memory of {contender.name}")
            entry["memory"] = _memory(op, case, contender, backward, calls[contender.name], alternation)
            extra = entry["memory"]["peak_extra_bytes"]
            entry["memory"]["per_tensor_bytes"] = None if extra is None else extra / result["tensor_bytes"]
        result["contenders"].append(entry)
    return result


def make_call(op: BenchOp, contender: Contender, inputs: Inputs, backward: bool) -> Callable[[], object]:
    """One call as it is timed: forward without gradients, or forward and backward."""
    if backward:
        return backward_call(op, contender, inputs)

    def call() -> object:
        with torch.no_grad():
            return contender.run(**inputs)

    return call


def memory_job(
    module: str, op: str, case: dict[str, Any], contender: str, backward: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """For the measuring process: (warm_up, call), the warm-up being the same call on few tokens, which loads what must
    be loaded without leaving memory behind that the real call could use again."""
    importlib.import_module(module)
    entry, real = get_op(op), Case(**case)
    small = replace(real, tokens=min(real.tokens, entry.warm_up_tokens(real)))
    found = entry.backends(real, backward)
    who = entry.baseline if contender == entry.baseline.name else found[contender]
    if isinstance(who, str):
        raise ValueError(f"{contender}: {who}")
    warm_up = make_call(entry, who, entry.make_inputs(small), backward)
    call = make_call(entry, who, entry.make_inputs(real), backward)
    return warm_up, call


def _memory(
    op: BenchOp, case: Case, contender: Contender, backward: bool, call: Callable[[], object], alternation: Alternation
) -> dict[str, Any]:
    if case.torch_device.type != "cpu":
        return memory.measure_in_process(call, case.torch_device)
    job = {
        "module": op.make_inputs.__module__,
        "op": op.name,
        "case": case.as_dict(),
        "contender": contender.name,
        "backward": backward,
    }
    timeout = 120 + 10 * alternation.timings[contender.name].median
    return memory.measure_in_child("coterie.bench.op:memory_job", job, timeout=timeout)


def _tensor_bytes(op: BenchOp, inputs: Inputs) -> int:
    """Size of query, key, value and output together, the unit in which extra memory is told."""
    output = inputs["query"].shape[:-1].numel() * inputs["value"].shape[-1] * inputs["value"].element_size()
    return output + sum(inputs[name].nbytes for name in ("query", "key", "value"))


def _too_big(contender: Contender, case: Case) -> str | None:
    """Why a contender with quadratic memory is refused, before the system runs out of memory and ends us all."""
    free = memory.available_bytes(case.torch_device)
    if contender.memory is None or free is None:
        return None
    needed = contender.memory(case)
    if needed <= _SHARE_OF_FREE_MEMORY * free:
        return None
    return f"it would take about {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
