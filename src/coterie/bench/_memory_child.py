"""The process in which `memory.measure_in_child` measures: reads a job from standard input, answers with one JSON line.

Linux keeps, per process, the highest resident set so far (VmHWM) and lets a process reset it by writing 5 to
/proc/self/clear_refs. Where that is not possible, the mark since the start of the process is used, and the figure is
only given if the call raised it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import sys
from pathlib import Path
from typing import Any

_PR_SET_THP_DISABLE = 41


def main() -> None:
    job = json.loads(sys.stdin.read())
    _make_resident_memory_exact()
    module, function = job["target"].split(":")
    warm_up, call = getattr(importlib.import_module(module), function)(**job["arguments"])
    warm_up()
    gc.collect()
    _return_free_memory()
    print(json.dumps(_measure(call)))


def _measure(call: Any) -> dict[str, Any]:
    if sys.platform != "linux":
        return _measure_by_rusage(call)
    resettable = _reset_high_water_mark()
    before, mark_before = _status("VmRSS"), _status("VmHWM")
    result = call()  # kept alive: the outputs count
    mark = _status("VmHWM")
    del result
    if resettable:
        return {"peak_extra_bytes": mark - before, "method": "VmHWM after /proc/self/clear_refs, fresh process"}
    if mark == mark_before:
        return _hidden(mark - before)
    return {"peak_extra_bytes": mark - before, "method": "VmHWM, fresh process, mark not resettable"}


def _measure_by_rusage(call: Any) -> dict[str, Any]:
    try:
        import resource
    except ImportError:
        return {"peak_extra_bytes": None, "method": None, "reason": f"no way to read the peak memory on {sys.platform}"}
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    result = call()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del result
    if after == before:
        return _hidden(0)
    return {"peak_extra_bytes": after - before, "method": "rise of ru_maxrss, fresh process (a lower bound)"}


def _hidden(height: int) -> dict[str, Any]:
    reason = f"the call stayed below what the process had used before it, that is below {height} bytes"
    return {"peak_extra_bytes": None, "method": None, "reason": reason}


def _make_resident_memory_exact() -> None:
    """No huge pages: they would count 2 MiB where 4 KiB are touched. Best effort, as not every system has them."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def _return_free_memory() -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """One figure of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
