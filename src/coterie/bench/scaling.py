"""`coterie bench scaling`: time and memory of one operation over the number of tokens, up to lengths that exact
attention cannot reach.

Exact attention, and whatever else is quadratic, is measured as long as its predicted time per call stays under a
budget; beyond, its time is extrapolated from the last measurement by the power law of its arithmetic, and every figure
that rests on that is marked as extrapolated. Memory is measured or left open, never extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from coterie.bench.console import Progress
from coterie.bench.op import check_directions, choose_contenders, measure_case
from coterie.bench.record import new_report
from coterie.bench.registry import Case, Contender, get_op
from coterie.bench.timing import DEFAULT_SETTINGS, Settings


def bench_scaling(
    name: str,
    cases: Sequence[Case],
    *,
    backends: Sequence[str] | None = None,
    direction: str = "forward",
    budget: float = 10.0,
    settings: Settings = DEFAULT_SETTINGS,
    measure_memory: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an operation over its length.

    Args:
        name: a name of `list_ops()`.
        cases: at least two cases that differ in tokens only, from `get_op(name).case(...)`; they are taken in rising
            order.
        backends: names to measure; None takes the one that "auto" would choose.
        direction: "forward" or "forward+backward".
        budget: seconds; a quadratic contender whose call would take longer is extrapolated.
        settings, measure_memory, progress: as for `bench_op`.

    Returns:
        The report, JSON-ready (docs/benchmarking.md lists its fields), with "crossover" and "growth" by contender.

    Raises:
        ValueError: an unknown name, backend or direction; fewer than two lengths; a budget that is not positive.
    """
    op, progress = get_op(name), progress or Progress(silent=True)
    check_directions([direction])
    if not 0 < budget < math.inf:
        raise ValueError(f"budget must be a positive number of seconds, got {budget}")
    cases = sorted(cases, key=lambda case: case.tokens)
    if len({case.tokens for case in cases}) < 2 or len({case.tokens for case in cases}) < len(cases):
        raise ValueError(
            f"scaling takes at least two different numbers of tokens, got {[case.tokens for case in cases]}"
        )
    backends = list(backends or ["auto"])
    choose_contenders(op, cases[0], direction, backends)  # a wrong name stops the run before the first measurement

    report = new_report("scaling", name, op.baseline.name, cases[0].torch_device, settings)
    report["settings"]["budget"] = budget
    last: dict[str, tuple[int, float]] = {}  # the longest measurement of each contender: (tokens, seconds)
    try:
        for case in cases:
            contenders = [op.baseline, *_backends(op, case, direction, backends)]
            affordable = [who for who in contenders if who.growth < 2 or _predict(who, case.tokens, last) <= budget]
            result = measure_case(op, case, direction, affordable, [], settings, measure_memory, progress)
            for entry in result["contenders"]:
                if "seconds" in entry:
                    last[entry["name"]] = (case.tokens, entry["seconds"]["median"])
            for who in contenders:
                if who not in affordable:
                    result["contenders"].append(_extrapolated(who, case, direction, last))
            _order(result, contenders)
            _complete_ratios(result, op.baseline.name)
            report["results"].append(result)
    except KeyboardInterrupt:
        report["interrupted"] = True
    report["crossover"] = crossovers(report)
    report["growth"] = growths(report)
    return report


def crossovers(report: dict[str, Any]) -> dict[str, float | None]:
    """From how many tokens on each contender is faster than the baseline: between two lengths interpolated on the
    logarithmic scale; the smallest length measured where it is faster from the start; None where it never is."""
    found: dict[str, float | None] = {}
    for name in dict.fromkeys(
        e["name"] for r in report["results"] for e in r["contenders"] if e["name"] != report["baseline"]
    ):
        points = [
            (result["case"]["tokens"], math.log(entry["ratio"]))
            for result in report["results"]
            for entry in result["contenders"]
            if entry["name"] == name and entry.get("ratio")
        ]
        found[name] = None
        slower = [index for index, (_, gain) in enumerate(points) if gain <= 0]
        if points and not slower:
            found[name] = float(points[0][0])
        elif points and slower[-1] + 1 < len(points):
            (before, loss), (after, gain) = points[slower[-1]], points[slower[-1] + 1]
            share = -loss / (gain - loss)
            found[name] = math.exp(math.log(before) + share * (math.log(after) - math.log(before)))
    return found


def growths(report: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The power of the number of tokens with which measured time and memory grow, between the two longest lengths
    measured: about 1 is linear, about 2 quadratic. None where fewer than two were measured."""
    found: dict[str, dict[str, float | None]] = {}
    for name in dict.fromkeys(entry["name"] for result in report["results"] for entry in result["contenders"]):
        times, memories = [], []
        for result in report["results"]:
            tokens = result["case"]["tokens"]
            for entry in result["contenders"]:
                if entry["name"] != name or "seconds" not in entry or entry.get("extrapolated"):
                    continue
                times.append((tokens, entry["seconds"]["median"]))
                if extra := entry.get("memory", {}).get("peak_extra_bytes"):
                    memories.append((tokens, extra))
        found[name] = {"time": _slope(times), "memory": _slope(memories)}
    return found


def _slope(points: list[tuple[int, float]]) -> float | None:
    if len(points) < 2:
        return None
    (before, low), (after, high) = points[-2:]
    return math.log(high / low) / math.log(after / before)


def _backends(op: Any, case: Case, direction: str, names: Sequence[str]) -> list[Contender]:
    """The backends asked for; one whose memory would not fit at this length is no longer among them."""
    found = op.backends(case, direction != "forward")
    wanted = dict.fromkeys(op.auto(case, direction != "forward") if name == "auto" else name for name in names)
    return [found[name] for name in wanted if isinstance(found[name], Contender)]


def _predict(contender: Contender, tokens: int, last: dict[str, tuple[int, float]]) -> float:
    """Seconds that a call at `tokens` will take; 0 as long as nothing is known. At short lengths, where the constant
    cost of a call counts, this is too much."""
    if contender.name not in last:
        return 0.0
    before, seconds = last[contender.name]
    return seconds * (tokens / before) ** contender.growth


def _extrapolated(
    contender: Contender, case: Case, direction: str, last: dict[str, tuple[int, float]]
) -> dict[str, Any]:
    return {
        "name": contender.name,
        "extrapolated": True,
        "extrapolated_from_tokens": last[contender.name][0],
        "growth": contender.growth,
        "seconds": {"median": _predict(contender, case.tokens, last)},
        "ratio": None,
        "ratio_quartiles": None,
        "flops": contender.flops(case, direction != "forward"),
        "flops_per_second": None,
        "times_floor": None,
    }


def _order(result: dict[str, Any], contenders: Sequence[Contender]) -> None:
    rank = {who.name: index for index, who in enumerate(contenders)}
    result["contenders"].sort(key=lambda entry: rank[entry["name"]])


def _complete_ratios(result: dict[str, Any], baseline: str) -> None:
    """Ratios that rest on an extrapolated time; they are marked."""
    timed = {entry["name"]: entry for entry in result["contenders"] if "seconds" in entry}
    if baseline not in timed:
        return
    base = timed[baseline]
    for entry in timed.values():
        if base.get("extrapolated") or entry.get("extrapolated"):
            entry["ratio"] = base["seconds"]["median"] / entry["seconds"]["median"]
            entry["ratio_quartiles"] = None
            entry["ratio_extrapolated"] = True
