"""The report: one JSON-ready dictionary per run of `coterie bench`, whose fields docs/benchmarking.md lists."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from coterie.bench.conditions import conditions
from coterie.bench.timing import Alternation, Settings, ratios
from coterie.engine.files import atomic_write

SCHEMA = "coterie.bench/1"


def new_report(kind: str, subject: str, baseline: str, device: torch.device, settings: Settings) -> dict[str, Any]:
    """A report without results yet; kind is "op", "model" or "scaling"."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "subject": subject,
        "baseline": baseline,
        "command": None,
        "conditions": conditions(device),
        "settings": asdict(settings),
        "interrupted": False,
        "results": [],
    }


def timing_record(name: str, alternation: Alternation, baseline: str, flops: int, matmul_rate: float) -> dict[str, Any]:
    """What is known of one timed contender.

    `floor_seconds` is the time of its FLOPs at the rate of a matrix product measured beside it, `times_floor` how many
    times longer it took; `arithmetic_share` of the report is the other floor: what a ratio could be if both ran at the
    same rate.
    """
    timing = alternation.timings[name]
    record: dict[str, Any] = {"name": name, "seconds": timing.as_dict(), "ratio": None, "ratio_quartiles": None}
    if baseline in alternation.timings:
        record |= ratios(alternation.timings[baseline], timing)
    floor = flops / matmul_rate
    return record | {
        "flops": flops,
        "flops_per_second": flops / timing.median,
        "floor_seconds": floor,
        "times_floor": timing.median / floor if floor else None,
    }


def save_report(report: dict[str, Any], folder: str | Path) -> Path:
    """Write the report under a name that carries its conditions; returns the path of the JSON file."""
    found = report["conditions"]
    dtype = report["results"][0]["case"]["dtype"] if report["results"] else "none"
    when = re.sub(r"[^0-9T]", "", found["date"].split("+")[0])
    parts = (report["kind"], report["subject"], found["device"], dtype, when)
    name = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", str(part)).strip("-")[:60] for part in parts)
    path = Path(folder) / f"{name}.json"
    atomic_write(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    return path


def failed(report: dict[str, Any]) -> list[str]:
    """One line for every contender that computed something wrong or broke down."""
    return [
        f"{case_label(result)}, {entry['name']}: {entry['error']}"
        for result in report["results"]
        for entry in result["contenders"]
        if "error" in entry
    ]


def case_label(result: dict[str, Any]) -> str:
    """How a result is called in tables and plots."""
    case = result["case"]
    if "tokens" in case:
        return f"{case['tokens']:,} tokens, {result['direction']}"
    size = case["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height}x{width} pixels, {result['direction']}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, on whatever device, ran out of memory."""
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in text or "allocate memory" in text
    )


def first_line(error: BaseException) -> str:
    """The first line of an error, without the advice that torch appends."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
