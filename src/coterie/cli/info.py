"""What runs on this machine: versions, devices, the backends of every operation, and why a backend would not run."""

import argparse
import importlib.metadata
import json
import os
import platform

HELP = "what runs on this machine, and why something would not"

_PACKAGES = ("torch", "timm", "triton", "accelerate", "torchmetrics", "datasets", "onnxruntime", "transformers")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `coterie info`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print what `coterie info` has found."""
    facts = gather()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"coterie {facts['coterie']}, Python {facts['python']}, {facts['platform']}")
    print("packages   " + ", ".join(f"{name} {version or '-'}" for name, version in facts["packages"].items()))
    print("devices    " + ", ".join(facts["devices"]))
    print(f"compiler   {facts['compiler'] or 'none found: the C++ kernels cannot be built'}")
    print(f"kernels    {facts['kernel_cache']}")
    set_variables = {k: v for k, v in facts["environment"].items() if v is not None}
    print("variables  " + (", ".join(f"{k}={v}" for k, v in set_variables.items()) or "none set (see ENVIRONMENT.md)"))
    for name, devices in facts["operations"].items():
        for device, row in devices.items():
            print(f"\n{name} on {device}, float32: {row['chosen']}")
            for backend, reason in row["reasons"].items():
                print(f"  {'->' if backend == row['chosen'] else '  '} {backend:<10} {reason}")
    return 0


def gather() -> dict:
    """All that `coterie info` tells, as plain data."""
    import torch

    import coterie
    from coterie.ops import _cpp, operations
    from coterie.ops._dispatch import Call

    devices = ["cpu"] + [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    report: dict = {}
    for name, operation in operations().items():
        report[name] = {}
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            told = operation.explain(Call(device, torch.float32, 64))
            report[name][device] = {"chosen": told.chosen, "reasons": dict(told.reasons)}
    return {
        "coterie": coterie.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "compiler": _cpp.compiler(),
        "kernel_cache": str(_cpp.cache_folder() / "kernels"),
        "environment": {
            k: os.environ.get(k) for k in ("COTERIE_BACKEND", "COTERIE_CACHE", "COTERIE_CXX", "COTERIE_NO_CPP")
        },
        "operations": report,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
