"""Measure speed and memory: an operation against exact attention, models against each other, or an operation over its
length.

Contenders run in alternation in one process; the table goes to standard output, progress to standard error, and a JSON
file and a picture with everything that was measured into a folder.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

HELP = "speed and memory of operations and models, side by side"

_EXAMPLES = """\
examples:
  coterie bench op dynamic_group --tokens 3136 12544 50176 --forward --backward
  coterie bench model dgt_tiny swin_tiny_patch4_window7_224 --size 224 --batch 8
  coterie bench model dgt_nano dgt_nano,attention=global --size 64 --train
  coterie bench scaling dynamic_group --tokens 784 3136 12544 50176 200704
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `coterie bench`."""
    parser.epilog = _EXAMPLES
    kinds = parser.add_subparsers(dest="kind", metavar="op | model | scaling", required=True)

    op = kinds.add_parser("op", help="backends of one operation against exact attention, at given shapes")
    _add_shapes(op)
    op.add_argument("--forward", action="store_true", help="time the forward pass (the default without --backward)")
    op.add_argument("--backward", action="store_true", help="time forward and backward together")
    _add_common(op, time_limit=30.0)

    model = kinds.add_parser("model", help="vision models against each other")
    model.add_argument(
        "names", nargs="+", metavar="MODEL", help="name, or name,option=value,... as in dgt_tiny,attention=global"
    )
    model.add_argument("--baseline", metavar="MODEL", help="what the others are compared with (default: the last)")
    model.add_argument(
        "--size", nargs="+", default=["224"], metavar="PIXELS", help="image sizes, as 224 or 800x1333 (default 224)"
    )
    model.add_argument("--batch", type=int, default=1, help="images per call (default 1)")
    model.add_argument("--train", action="store_true", help="time forward and backward together, in training mode")
    model.add_argument("--channels-last", action="store_true", help="memory format of model and images")
    model.add_argument("--compile", action="store_true", help="run every model through torch.compile")
    _add_common(model, time_limit=60.0)

    scaling = kinds.add_parser("scaling", help="time and memory of one operation over the number of tokens")
    _add_shapes(scaling)
    scaling.add_argument("--backward", action="store_true", help="forward and backward together (default: forward)")
    scaling.add_argument(
        "--budget", type=float, default=10.0, metavar="SECONDS",
        help="a quadratic contender whose call would take longer is extrapolated, and marked so (default 10)",
    )  # fmt: skip
    _add_common(scaling, time_limit=20.0)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write JSON and picture. Returns 1 if a contender computed something wrong or broke
    down."""
    import torch

    from coterie.bench.conditions import open_device
    from coterie.bench.console import Progress
    from coterie.bench.plot import save_plot
    from coterie.bench.record import failed, save_report
    from coterie.bench.table import print_report
    from coterie.bench.timing import Settings

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    args.device = str(open_device(args.device))
    settings = Settings(precision=args.precision / 100, time_limit=args.time_limit)
    measure = {"op": _op, "model": _model, "scaling": _scaling}[args.kind]
    with Progress() as progress:
        report = measure(args, settings=settings, measure_memory=not args.no_memory, progress=progress)
    report["command"] = _command(args)

    print_report(report)
    path = save_report(report, args.output)
    print(f"bench: figures in {path}", file=sys.stderr)
    try:
        if picture := save_plot(report, path.with_suffix(".png")):
            print(f"bench: picture in {picture}", file=sys.stderr)
    except ImportError:
        print("bench: no picture, as matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    problems = failed(report)
    for line in problems:
        print(f"coterie bench: error: {line}", file=sys.stderr)
    return 130 if report["interrupted"] else 1 if problems else 0


def _command(args: argparse.Namespace) -> str:
    """The command that repeats this run, with every default spelt out, so that it still does when they have changed."""
    given = dict(vars(args))
    words = ["coterie", "bench", given.pop("kind")]
    words += given.pop("names") if "names" in given else [given.pop("name")]
    for name in ("command", "output"):
        given.pop(name, None)
    for name, value in given.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values)]
    return shlex.join(words)


def _op(args: argparse.Namespace, **how: Any) -> dict[str, Any]:
    from coterie.bench.op import bench_op

    directions = ["forward"] if args.forward or not args.backward else []
    directions += ["forward+backward"] if args.backward else []
    return bench_op(args.name, _cases(args), backends=args.backends, directions=directions, **how)


def _scaling(args: argparse.Namespace, **how: Any) -> dict[str, Any]:
    from coterie.bench.scaling import bench_scaling

    direction = "forward+backward" if args.backward else "forward"
    cases = _cases(args)
    return bench_scaling(args.name, cases, backends=args.backends, direction=direction, budget=args.budget, **how)


def _model(args: argparse.Namespace, **how: Any) -> dict[str, Any]:
    from coterie.bench.model import ModelCase, bench_model

    shared = {
        name: getattr(args, name) for name in ("batch", "dtype", "device", "train", "channels_last", "compile", "seed")
    }
    return bench_model(
        args.names, [ModelCase(size=_pixels(size), **shared) for size in args.size], baseline=args.baseline, **how
    )


def _pixels(text: str) -> int | tuple[int, int]:
    """224, or (800, 1333) of "800x1333"."""
    sides = text.lower().split("x")
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--size takes pixels as 224, or height x width as 800x1333, got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _cases(args: argparse.Namespace) -> list[Any]:
    from coterie.bench.registry import get_op

    op = get_op(args.name)
    options = {name: getattr(args, name) for name in _option_names() if getattr(args, name) is not None}
    sizes = {name: getattr(args, name) for name in ("batch", "heads", "head_dim", "dtype", "device", "seed")}
    return [op.case(tokens=tokens, options=options, **sizes) for tokens in args.tokens]


def _option_names() -> dict[str, str]:
    """The options of all measurable operations, with a help line that says whose they are."""
    from coterie.bench.registry import get_op, list_ops

    found: dict[str, str] = {}
    for op in map(get_op, list_ops()):
        for name, option in op.options.items():
            found[name] = f"{found[name]}; " if name in found else ""
            found[name] += f"{op.name}: {option.help} (default {option.default})"
    return found


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    from coterie.bench.registry import list_ops

    parser.add_argument("name", metavar="OPERATION", help=f"one of {', '.join(list_ops())}")
    parser.add_argument("--tokens", nargs="+", type=int, required=True, metavar="N", help="numbers of tokens")
    parser.add_argument("--batch", type=int, default=1, help="(default 1)")
    parser.add_argument("--heads", type=int, default=2, help="(default 2)")
    parser.add_argument("--head-dim", type=int, default=32, help="(default 32)")
    parser.add_argument(
        "--backends", nargs="+", metavar="NAME", help="backends to measure (default: those that can run)"
    )
    for name, text in _option_names().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=text)


def _add_common(parser: argparse.ArgumentParser, time_limit: float) -> None:
    parser.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16 or float64")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the accelerator, if there is one)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument(
        "--precision", type=float, default=2.0, metavar="PERCENT",
        help="stop when every median is known this well, as half-width of its 95%% confidence interval (default 2)",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=float, default=time_limit, metavar="SECONDS",
        help=f"of timing one case, of which three rounds are run anyway (default {time_limit:g})",
    )  # fmt: skip
    parser.add_argument(
        "--no-memory", action="store_true", help="do not measure memory (on the CPU one process per figure)"
    )
    parser.add_argument(
        "--output", default="bench_results", metavar="FOLDER", help="for JSON and picture (default bench_results)"
    )
