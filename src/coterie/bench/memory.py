"""Peak extra memory of one call: what it takes beyond its inputs at its worst moment, its outputs included.

On a GPU torch's allocator is asked. On a CPU torch does not know what a C++ kernel or a BLAS allocates, so the
operating system is: a fresh process per contender makes the inputs, resets the kernel's high-water mark of resident
memory, makes one call and reads the mark (`_memory_child.py`). Every report names the method.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coterie.bench.record import first_line

TORCH_METHOD = "torch.accelerator.max_memory_allocated above memory_allocated before the call, after warm-up"


def measure_in_process(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Peak extra memory of `call` on an accelerator, as torch's allocator sees it: {"peak_extra_bytes", "method"}."""
    try:
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        call()
        torch.accelerator.synchronize(device)
        peak = torch.accelerator.max_memory_allocated(device) - before
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return unknown(f"torch does not tell the memory of {device.type}: {first_line(error)}")
    return {"peak_extra_bytes": peak, "method": TORCH_METHOD}


def measure_in_child(target: str, arguments: dict[str, Any], *, timeout: float = 600.0) -> dict[str, Any]:
    """Peak extra memory of one call on the CPU, in a fresh process.

    Args:
        target: "module:function"; the function, called with `arguments`, returns (warm_up, call).
        arguments: JSON-ready keyword arguments of that function.
        timeout: seconds after which the process is stopped and the figure stays open.

    Returns:
        {"peak_extra_bytes": int or None, "method": str}, and "reason" where there is no figure.
    """
    job = {"target": target, "arguments": arguments}
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    source = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH", "")]))
    # glibc keeps freed memory for later; with these it returns every block from 64 KiB up at once, so that the figure
    # of the call is neither hidden by what was freed before it nor inflated by what it freed itself.
    environment.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    try:
        done = subprocess.run(
            # The file, not the module, so that nothing is loaded but what the job needs; -P keeps its folder, whose
            # files are called like modules of others, out of the import path.
            [sys.executable, "-P", str(Path(__file__).with_name("_memory_child.py"))],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return unknown(f"the measuring process took more than {timeout:.0f} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return unknown(f"the measuring process ended with {done.returncode}: {lines[-1] if lines else 'no message'}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def unknown(reason: str) -> dict[str, Any]:
    """No figure, and why."""
    return {"peak_extra_bytes": None, "method": None, "reason": reason}


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on `device`, in bytes; None where nobody tells."""
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as file:
                for line in file:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            return None
        return None
    try:
        return int(torch.accelerator.get_memory_info(device)[0])
    except (RuntimeError, NotImplementedError, ValueError):
        return None
