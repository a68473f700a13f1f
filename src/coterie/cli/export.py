"""Write a trained run as an ONNX file, and check with onnxruntime that it gives what the model gives.

Classification and semantic segmentation are exported whole. Detectors (object-detection, instance-segmentation) are
not: how many boxes they give depends on the picture. Their backbone is, with --part backbone.

examples:
  coterie export runs/digits
  coterie export runs/street --output street.onnx --size 512 1024
  coterie export runs/cells --part backbone
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write a trained run as ONNX"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder that coterie train wrote")
    parser.add_argument("--output", metavar="FILE", type=Path, help="file to write (default: RUN/model.onnx)")
    parser.add_argument("--part", default="whole", choices=("whole", "backbone"), help="(default whole)")
    parser.add_argument(
        "--size", nargs="+", type=int, metavar="PIXELS",
        help="height and width of the pictures, or one number for a square (default: those of training)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", default="final", choices=("final", "best"), help="the last weights or the best ones"
    )


def run(args: argparse.Namespace) -> int:
    """Export, compare and say what came out."""
    from coterie.engine import load_run
    from coterie.engine.export import export

    if args.size is not None and len(args.size) > 2:
        raise ValueError(f"--size: got {len(args.size)} numbers, takes one, or height and width")
    size = None if args.size is None else (args.size[0], args.size[-1])
    loaded = load_run(args.run, args.weights)
    done = export(loaded, args.output or Path(args.run, f"{STEM[args.part]}.onnx"), part=args.part, size=size)
    print(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB")
    print(f"  input   image {_shape(done.input)}, pixels from 0 to 1")
    for name, shape in done.outputs.items():
        print(f"  output  {name} {_shape(shape)}")
    print(f"  onnxruntime agrees with the model: greatest difference {done.difference:.1e} of the largest value")
    return 0


STEM = {"whole": "model", "backbone": "backbone"}


def _shape(shape: tuple) -> str:
    return f"({', '.join(map(str, shape))})"
