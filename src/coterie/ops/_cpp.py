"""Compiling a C++ kernel file on first use: one call of the system's compiler, kept in a cache, loaded with ctypes.

The kernels include no torch header, so that this takes seconds and a compiled file serves every torch version. Where
no compiler is,
or it fails, `load` gives None after one warning and the operations go on in torch operators.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


def compiler() -> str | None:
    """The C++ compiler that would be used: COTERIE_CXX, CXX, c++, g++ or clang++, or None."""
    for name in (os.environ.get("COTERIE_CXX"), os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name is not None and (found := shutil.which(name)) is not None:
            return found
        if name is not None and name == os.environ.get("COTERIE_CXX"):
            return None  # asked for by name: no other compiler takes its place
    return None


def cache_folder() -> Path:
    """Where compiled kernels are kept: COTERIE_CACHE, else the user's cache folder."""
    if folder := os.environ.get("COTERIE_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "coterie"


def _processor() -> str:
    """What `-march=native` depends on, so that a cache shared by several machines serves none of them a foreign
    kernel."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


@cache
def refusal(source: Path) -> str | None:
    """None if the kernels of `source` can be used in this process, else one sentence why not. Compiles on the first
    call."""
    return _build(source)[1]


@cache
def load(source: Path) -> ctypes.CDLL | None:
    """The compiled kernels of `source`, or None where they cannot be had."""
    return _build(source)[0]


@cache
def _build(source: Path) -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("COTERIE_NO_CPP"):
        return None, "C++ kernels are switched off by COTERIE_NO_CPP"
    if sys.platform not in ("linux", "darwin"):
        return None, f"C++ kernels are built on Linux and macOS only, this is {sys.platform}"
    cxx = compiler()
    reason = "no C++ compiler was found (install g++ or clang++, or name one in COTERIE_CXX)" if cxx is None else None
    if cxx is not None:
        try:
            return _compile(cxx, source), None
        except subprocess.CalledProcessError as error:
            first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
            reason = f"{cxx} could not compile {source.name}: {first}"
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"the kernels of {source.name} could not be built or loaded: {error}"
    warnings.warn(f"coterie: {reason}; slower torch operators are used instead", RuntimeWarning, stacklevel=2)
    return None, reason


def _compile(cxx: str, source: Path) -> ctypes.CDLL:
    headers = Path(__file__).parent
    included = [*sorted(headers.glob("*.h")), *sorted(source.parent.glob("*.h"))]
    code = "".join(file.read_text() for file in (source, *included))
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256("\0".join([code, cxx, version, *_FLAGS, platform.machine(), _processor()]).encode())
    folder = cache_folder() / "kernels"
    target = folder / f"{source.parent.name}-{source.stem}-{key.hexdigest()[:20]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch) / "kernels.so"
            subprocess.run(
                [cxx, *_FLAGS, f"-I{headers}", "-o", str(fresh), str(source)],
                capture_output=True,
                text=True,
                check=True,
                timeout=600,
            )
            fresh.replace(target)  # several processes may build at once: the last rename wins, all are equal
    return ctypes.CDLL(str(target))
