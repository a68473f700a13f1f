"""Evaluate a trained run on its test pictures or text, or on others.

examples:
  coterie eval runs/digits
  coterie eval runs/photos --data folder:new_photos
  coterie eval runs/shakespeare --data text:sonnets.txt      loss, perplexity, bits per byte and per character
  coterie eval runs/digits --split train --weights best --json
"""

from __future__ import annotations

import argparse
import json

HELP = "evaluate a trained run"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder that coterie train wrote")
    parser.add_argument(
        "--data", metavar="SOURCE", help="other data: folder:PATH, text:FILE, parquet:PATH, ... (by default the run's)"
    )
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument(
        "--weights", default="final", choices=("final", "best"), help="the last weights or the best ones"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from coterie.engine import evaluate

    result = evaluate(args.run, data=args.data, split=args.split, weights=args.weights, device=args.device)
    if args.json:
        print(
            json.dumps(
                {"run": args.run, "data": args.data, "split": args.split, "samples": result.images, **result.figures}
            )
        )
        return 0
    print(f"{args.split}: {result.images:,} samples")
    width = max(map(len, result.figures))
    for name, value in result.figures.items():
        print(f"  {name:<{width}}  {value:.4f}")
    for comment in result.comments:
        print(comment)
    return 0
