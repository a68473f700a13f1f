"""The conditions that travel with every figure: machine, versions, threads, date; and the checks of device and dtype
names."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
import time
from typing import Any

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def conditions(device: torch.device) -> dict[str, Any]:
    """What a reader needs to know to repeat or to distrust a figure, JSON-ready."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(device),
        "device_name": _device_name(device),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("coterie", "torch", "timm", "triton")},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "backend_override": os.environ.get("COTERIE_BACKEND") or None,
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return found


def open_device(name: str | None) -> torch.device:
    """The device of that name, or the machine's accelerator (else the CPU) for None.

    Raises:
        ValueError: no such device, or not on this machine.
    """
    if name is None:
        return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or torch.device(
            "cpu"
        )
    present = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        present += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; on this machine: {', '.join(present)}") from None
    if device.type == "cpu":
        return device
    if f"{device.type}:{device.index or 0}" not in present:
        raise ValueError(f"device {name!r} is not available; on this machine: {', '.join(present)}")
    return device


def open_dtype(name: str) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        ValueError: not one of the dtypes that can be measured.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; it takes {', '.join(DTYPES)}")
    return DTYPES[name]


def synchronizer(device: torch.device) -> Any:
    """A function that waits until `device` has finished; does nothing for the CPU, which works as it is called."""
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product here and now, in `dtype` or in float32, whichever is faster: where a processor
    has no arithmetic in `dtype`, good code computes in float32.

    An arithmetic floor assumes this rate: what is made of matrix products does no better than one of them.
    """
    return max(_matmul_rate(device, one) for one in {dtype, torch.float32})


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type != "cpu" else 1024 if dtype == torch.float32 else 512
    a = torch.ones(size, size, device=device, dtype=dtype)
    wait, fastest, tries, started = synchronizer(device), float("inf"), 0, time.perf_counter()
    while tries < 3 or (time.perf_counter() - started < 0.1 and tries < 50):
        wait()
        start = time.perf_counter()
        torch.mm(a, a)
        wait()
        fastest, tries = min(fastest, time.perf_counter() - start), tries + 1
    return 2 * size**3 / fastest


def _cpu_name() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo") as file:
                for line in file:
                    if line.startswith("model name"):
                        return line.split(":", 1)[1].strip()
        except OSError:
            return platform.machine()
    return platform.processor() or platform.machine()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name() if device.type == "cpu" else device.type


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
