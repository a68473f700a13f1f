"""Classify image files with a trained run.

A file that cannot be read is reported and the others are still done; the exit code is then 1.

examples:
  coterie predict runs/digits three.png
  coterie predict runs/photos holiday/*.jpg --top 3
  coterie predict runs/photos holiday/*.jpg --json > answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys

HELP = "classify image files"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder that coterie train wrote")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="answers shown for each image (default 3)")
    parser.add_argument(
        "--weights", default="final", choices=("final", "best"), help="the last weights or the best ones"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each image")


def run(args: argparse.Namespace) -> int:
    """Print the answers, image by image."""
    from coterie.engine import predict

    if args.top < 1:
        raise ValueError(f"--top: got {args.top}, takes a number of at least 1")
    failed = 0
    width = max(len(path) for path in args.images)
    for prediction in predict(args.run, args.images, weights=args.weights, device=args.device):
        answers = prediction.answers[: args.top]
        if args.json:
            outcome = {"error": prediction.error} if prediction.error else {"answers": [list(pair) for pair in answers]}
            print(json.dumps({"image": prediction.path, **outcome}), flush=True)
        elif not prediction.error:
            shown = "  ".join(f"{name} {certainty:6.1%}" for name, certainty in answers)
            print(f"{prediction.path:<{width}}  {shown}", flush=True)
        if prediction.error:
            failed += 1
            print(f"coterie predict: {prediction.path}: {prediction.error}", file=sys.stderr)
    return 1 if failed else 0
