"""Train a model on your pictures or text, or on data that is installed already when you name none.

examples:
  coterie train                                              digits, with the defaults below
  coterie train --config recipes/digits.yaml                 a recipe
  coterie train --data folder:photos                         your pictures, one folder per class
  coterie train --task semantic-segmentation --data digit-scenes     a class for every pixel
  coterie train --task object-detection --data coco:street   boxes; also instance-segmentation
  coterie train --task language-modeling --data text:book.txt        a DCFormer; --model llama for the baseline
  coterie train --config recipes/cifar10.yaml --train.epochs 5 --model.options.attention global
  coterie train --resume runs/digits                         go on with a run that was stopped or killed
  coterie train --print_config                               show the whole configuration and stop
  accelerate launch --multi_gpu --num_processes 2 $(which coterie) train ...    several processes
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

HELP = "train a model on pictures or text"
JSONARGPARSE = True
SHORT = {"--task": "--task.name", "--data": "--data.source", "--model": "--model.name", "--output": "--output.dir"}


def configure(parser: ArgumentParser) -> None:
    """Declare every field of the run's configuration as a dotted option."""
    # Before torch is loaded: threads that wait for one another sleep instead of spinning. Where other programs want the
    # cores too, a spinning thread keeps off the one it waits for, and small models train ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from coterie.engine.config import add_arguments

    add_arguments(parser)
    parser.usage = (
        "coterie train [--task NAME] [--data SOURCE] [--model NAME] [--output FOLDER] [--config FILE] "
        "[--SECTION.FIELD VALUE ...] [--resume [RUN]] [--no-report]"
    )
    parser.error = functools.partial(_refuse, parser)  # type: ignore[method-assign]
    parser.add_argument(
        "--resume", nargs="?", const=True, metavar="RUN",
        help="go on from the latest checkpoint of the folder RUN (or of output.dir)",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="do not write report.html at the end")


def run(args: Any) -> int:
    """Train, then write the report."""
    from coterie.engine import NonFiniteLoss, train
    from coterie.engine.config import config_from_arguments, dump_config

    config = config_from_arguments(args)
    if isinstance(args.resume, str):
        config.output.dir = args.resume
    try:
        result = train(config, resume=bool(args.resume), show=dump_config)
    except NonFiniteLoss as error:
        print(f"coterie train: error: {error}", file=sys.stderr)
        return 1
    if result.interrupted:
        print(f"stopped at step {result.step}; go on with: coterie train --resume {result.run_dir}")
        return 130
    if result.main:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        print(f"test: {figures}  ({result.seconds:.0f} s)")
        if not args.no_report:
            _report(result.run_dir)
        use = "generate {} --prompt TEXT" if config.task.name == "language-modeling" else "predict {} IMAGE"
        print(f"use it: coterie {use.format(result.run_dir)}")
    return 0


def _report(run_dir: Any) -> None:
    from coterie.inspect.report import write_report

    print(f"report: {write_report(run_dir)}")


def _refuse(parser: ArgumentParser, message: str, cause: Exception | None = None) -> NoReturn:
    """One line instead of a page of usage, with the nearest option where a name is wrong."""
    text = " ".join(message.split())
    known = [option for action in parser._actions for option in action.option_strings]
    wrong = [word.split("=")[0] for word in text.split() if word.startswith("--")]
    near = difflib.get_close_matches(wrong[0], known, 1) if wrong and wrong[0] not in known else []
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"coterie train: error: {text}{hint}", file=sys.stderr)
    raise SystemExit(2)
