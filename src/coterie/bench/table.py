"""A report as a table for people: one block per case, the baseline first, the conditions below."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from coterie.bench.console import megabytes, number, print_table, seconds
from coterie.bench.record import case_label

_OP_COLUMNS = ("contender", "median", "quartiles", "faster", "extra memory", "x of q,k,v,out", "GFLOP/s", "x of floor")
_MODEL_COLUMNS = (
    "model",
    "median",
    "quartiles",
    "images/s",
    "faster",
    "extra memory",
    "params",
    "GMACs/image",
    "x of floor",
)


def print_report(report: dict[str, Any], stream: TextIO | None = None) -> None:
    """Print every result of `report`, then what the figures depend on."""
    stream = stream or sys.stdout
    for result in report["results"]:
        columns, row_of = (_MODEL_COLUMNS, _model_row) if report["kind"] == "model" else (_OP_COLUMNS, _op_row)
        rows = [row_of(entry) if "seconds" in entry else _failed_row(entry, columns) for entry in result["contenders"]]
        if rows:
            print_table(_title(report, result), columns, rows, stream)
        for line in _remarks(report, result):
            print(f"  {line}", file=stream)
        print(file=stream)
    for line in footer(report):
        print(line, file=stream)


def footer(report: dict[str, Any]) -> list[str]:
    """The conditions and the meaning of the columns, in a few lines."""
    found = report["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    methods = sorted(
        {
            str(entry["memory"].get("method") or f"none ({entry['memory']['reason']})")
            for result in report["results"]
            for entry in result["contenders"]
            if "memory" in entry
        }
    )
    lines = [
        f"faster: median of {report['baseline']} / median of the row; x of floor: median / (FLOPs at a matmul's rate)",
        f"{found['device_name']} ({found['device']}), {found['threads']} threads of {found['cores']} cores",
        f"{versions}, {found['date']}",
    ]
    if methods:
        lines.append(f"extra memory: beyond the inputs, outputs included; by {'; '.join(methods)}")
    lines += _scaling_lines(report)
    load = found["load_average"]
    if load and load[0] > 0.5 * found["cores"]:
        lines.append(
            f"note: the machine was busy when this began (load average {load[0]:.1f} on {found['cores']} cores)"
        )
    if report["interrupted"]:
        lines.append("note: interrupted; these are the results so far")
    return lines


def _scaling_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for name, growth in report.get("growth", {}).items():
        powers = [f"{what} as tokens^{power:.2f}" for what, power in growth.items() if power is not None]
        if powers:
            lines.append(f"{name}: {', '.join(powers)} between the two longest lengths measured")
    for name, tokens in report.get("crossover", {}).items():
        where = "at no length here" if tokens is None else f"from about {tokens:,.0f} tokens on"
        lines.append(f"{name} is faster than {report['baseline']} {where}")
    return lines


def _title(report: dict[str, Any], result: dict[str, Any]) -> str:
    case = result["case"]
    if report["kind"] == "model":
        extra = [name for name, on in (("channels-last", case["channels_last"]), ("compiled", case["compile"])) if on]
        details = [f"batch {case['batch']}", case["dtype"], *extra]
    else:
        details = [f"batch {case['batch']}", f"{case['heads']} heads of {case['head_dim']}", case["dtype"]]
        details += [f"{name} {value}" for name, value in case["options"].items() if value]
    return f"{case_label(result)}: {', '.join(details)}"


def _remarks(report: dict[str, Any], result: dict[str, Any]) -> list[str]:
    lines = [f"{entry['name']}: {entry['error']}" for entry in result["contenders"] if "error" in entry]
    lines += [f"{skipped['name']} left out: {skipped['reason']}" for skipped in result["skipped"]]
    timed = [entry for entry in result["contenders"] if "flops" in entry]
    baseline = next((entry for entry in timed if entry["name"] == report["baseline"]), None)
    if report["kind"] != "model":
        bounds = {entry["flops"] for entry in timed if entry is not baseline}
        if baseline is not None and len(bounds) == 1 and (least := bounds.pop()) != baseline["flops"]:
            lines.append(f"arithmetic alone would allow {number(baseline['flops'] / least)}x")
        if result.get("auto_backend"):
            lines.append(f'backend="auto" is {result["auto_backend"]}')
    if "rounds" in result:
        worst = max(
            (e["seconds"]["precision"] for e in timed if "seconds" in e and "samples" in e["seconds"]), default=0.0
        )
        lines.append(
            f"{result['rounds']} alternating rounds, stopped by {result['stopped_by']}; medians known to {worst:.1%}"
        )
    return lines


def _op_row(entry: dict[str, Any]) -> list[str]:
    memory = entry.get("memory", {})
    return [
        _name(entry),
        *_timing_cells(entry),
        _ratio(entry),
        megabytes(memory.get("peak_extra_bytes")),
        number(memory.get("per_tensor_bytes")),
        number(None if entry["flops_per_second"] is None else entry["flops_per_second"] / 1e9),
        number(entry["times_floor"]),
    ]


def _model_row(entry: dict[str, Any]) -> list[str]:
    return [
        _name(entry),
        *_timing_cells(entry),
        number(entry["images_per_second"]),
        _ratio(entry),
        megabytes(entry.get("memory", {}).get("peak_extra_bytes")),
        f"{entry['parameters'] / 1e6:.2f} M",
        f"{entry['macs_per_image'] / 1e9:.3f}",
        number(entry["times_floor"]),
    ]


def _timing_cells(entry: dict[str, Any]) -> list[str]:
    figures = entry["seconds"]
    if entry.get("extrapolated"):
        return [f"~{seconds(figures['median'])}", "-"]
    return [seconds(figures["median"]), f"{seconds(figures['quartile_1'])} .. {seconds(figures['quartile_3'])}"]


def _ratio(entry: dict[str, Any]) -> str:
    return ("~" if entry.get("ratio_extrapolated") else "") + number(entry["ratio"], "x")


def _name(entry: dict[str, Any]) -> str:
    return f"{entry['name']} (extrapolated)" if entry.get("extrapolated") else entry["name"]


def _failed_row(entry: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    return [entry["name"], "failed", *["-"] * (len(columns) - 2)]
