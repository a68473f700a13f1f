"""Ask a trained run about image files: classes, boxes, masks or label maps, as the run was trained for.

A file that cannot be read is reported and the others are still done; the exit code is then 1. Detectors and
segmentation also write pictures, with what was found drawn on them and a legend, and a file that other tools read:
COCO json for instances, one PNG of class numbers for each label map.

examples:
  coterie predict runs/digits three.png
  coterie predict runs/photos holiday/*.jpg --top 3
  coterie predict runs/photos holiday/*.jpg --json > answers.jsonl
  coterie predict runs/street photos/ --output found --score 0.3
  coterie predict runs/cells val/ --score 0 --numbers instances_val.json      for COCO's own evaluation
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coterie.engine import LoadedRun, Prediction

HELP = "ask a trained run about image files"

FORMATS = {"instances": ("coco", "json"), "label_map": ("png", "json")}
FILES = {"coco": "predictions.coco.json", "json": "predictions.json"}
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder that coterie train wrote")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, or folders with image files")
    parser.add_argument("--top", type=int, default=3, metavar="N", help="answers shown for each image (default 3)")
    parser.add_argument(
        "--weights", default="final", choices=("final", "best"), help="the last weights or the best ones"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each image")
    dense = parser.add_argument_group("detectors and segmentation")
    dense.add_argument("--output", metavar="FOLDER", help="folder for pictures and files (default: RUN/predictions)")
    dense.add_argument(
        "--format", choices=("coco", "png", "json"),
        help="of the file: coco for instances, png for label maps (the defaults), or json for both",
    )  # fmt: skip
    dense.add_argument(
        "--score", type=float, default=0.5, metavar="S",
        help="leave out instances of a lower score (default 0.5; 0 keeps all, as evaluation tools want it)",
    )  # fmt: skip
    dense.add_argument(
        "--numbers", metavar="FILE",
        help="a COCO annotation file whose numbers of images and categories the coco file takes (default: from 1 on)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the answers, image by image; for dense tasks write pictures and files."""
    from coterie.engine import load_run, predict

    if args.top < 1:
        raise ValueError(f"--top: got {args.top}, takes a number of at least 1")
    if not 0 <= args.score <= 1:
        raise ValueError(f"--score: got {args.score}, takes a number from 0 to 1")
    paths = image_files(args.images)
    loaded = load_run(args.run, args.weights)
    writer = Writer(args, loaded, paths) if loaded.source.target in FORMATS else None
    if writer is None and (args.output or args.format or args.numbers):
        raise ValueError(
            "--output, --format and --numbers are for detectors and segmentation; this run classifies: take --json"
        )
    failed = 0
    width = max(map(len, paths))
    for prediction in predict(loaded, paths, device=args.device):
        known: dict[str, Any] = {"image": prediction.path}
        if prediction.error:
            failed += 1
            known["error"] = prediction.error
            print(f"coterie predict: {prediction.path}: {prediction.error}", file=sys.stderr)
        elif writer:
            known, shown = writer.take(prediction, args.top)
        else:
            answers = prediction.answers[: args.top]
            known["answers"] = [list(pair) for pair in answers]
            shown = "  ".join(f"{name} {certainty:6.1%}" for name, certainty in answers)
        if args.json:
            print(json.dumps(known), flush=True)
        elif not prediction.error:
            print(f"{prediction.path:<{width}}  {shown}", flush=True)
    if writer and (said := writer.close()):
        print(said, file=sys.stderr if args.json else sys.stdout)
    return 1 if failed else 0


def image_files(given: list[str]) -> list[str]:
    """The files among `given`, and for each folder the image files right inside it, in the order of their names.

    Raises:
        ValueError: a folder without image files.
    """
    paths: list[str] = []
    for entry in given:
        if not Path(entry).is_dir():
            paths.append(entry)
            continue
        inside = sorted(str(path) for path in Path(entry).iterdir() if path.suffix.lower() in ENDINGS)
        if not inside:
            raise ValueError(f"{entry}: a folder without image files in it; takes {', '.join(sorted(ENDINGS))}")
        paths += inside
    return paths


class Writer:
    """Writes the pictures and files of dense predictions."""

    def __init__(self, args: argparse.Namespace, run: LoadedRun, paths: list[str]) -> None:
        from coterie.engine import answers

        takes = FORMATS[run.source.target]
        if args.format and args.format not in takes:
            raise ValueError(
                f"--format: got {args.format}, this run ({run.config.task.name}) takes {' or '.join(takes)}"
            )
        self.format: str = args.format or takes[0]
        self.numbers = None
        if args.numbers:
            if self.format != "coco":
                raise ValueError(f"--numbers: only the coco format has numbers, and this is {self.format}")
            self.numbers = answers.coco_numbers(Path(args.numbers), run.source.classes, paths)
        self.task: Any = run.task
        self.classes, self.least = run.source.classes, args.score
        self.folder = Path(args.output) if args.output else run.run_dir / "predictions"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output: {self.folder} is a file; takes a folder")
        self._stems = dict(zip(paths, stems(paths), strict=True))
        self._done: list[dict[str, Any]] = []  # plain data only: pictures and masks of many images fill the memory

    def take(self, prediction: Prediction, top: int) -> tuple[dict[str, Any], str]:
        """Write the files of one prediction. Returns it as plain data, and as a line for people."""
        from coterie.engine import answers
        from coterie.engine.files import atomic_write

        prediction.answers = answers.keep_certain(prediction.answers, self.least)
        stem = self._stems[prediction.path]
        assert prediction.image is not None
        drawn = self.task.draw(*answers.fit(prediction.image, prediction.answers))
        atomic_write(self.folder / f"{stem}.png", answers.png(drawn))
        if self.format == "png":
            label_map = answers.label_map_png(prediction.answers["label_map"], self.task.palette())
            atomic_write(self.folder / "label_maps" / f"{stem}.png", label_map)
        known = answers.plain(prediction, self.classes)
        if "shares" in known:
            shown = "  ".join(f"{name} {share:6.1%}" for name, share in list(known["shares"].items())[:top])
        else:
            found = known["instances"]
            more = f"  and {len(found) - top} more" if len(found) > top else ""
            shown = "  ".join(f"{entry['class']} {entry['score']:.0%}" for entry in found[:top]) + more or "nothing"
        self._done.append(known)
        return known, shown

    def close(self) -> str:
        """Write the file about all images. Returns what to say about it all."""
        from coterie.engine import answers
        from coterie.engine.files import atomic_write

        if not self._done:
            return ""
        said = f"pictures: {self.folder}"
        if self.format == "png":
            atomic_write(self.folder / "label_maps" / "classes.json", json.dumps(self.classes, indent=1))
            return f"{said}\nlabel maps: {self.folder / 'label_maps'}"
        if self.format == "coco":
            text = answers.coco_text(self._done, self.classes, self.numbers)
        else:
            text = json.dumps(self._done)
        return f"{said}\nfile: {atomic_write(self.folder / FILES[self.format], text)}"


def stems(paths: list[str]) -> list[str]:
    """A file name for each path: its own without the ending, numbered where two are the same."""
    taken: dict[str, int] = {}
    names = []
    for path in paths:
        stem = Path(path).stem
        taken[stem] = taken.get(stem, 0) + 1
        names.append(stem if taken[stem] == 1 else f"{stem}-{taken[stem]}")
    return names
