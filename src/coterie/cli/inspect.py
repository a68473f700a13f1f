"""See which tokens of an image group together, and which keys each group chose, per stage, block and head.

Of a language model see how strongly its heads compose.

  coterie inspect runs/digits photo.png cat.jpg      a trained run and your pictures
  coterie inspect runs/digits                        a trained run and a few pictures of its own test split
  coterie inspect --model dgt_nano photo.png         any model by name with random weights, to try it
  coterie inspect --model dgt_tiny                   the same on a sample photograph
  coterie inspect runs/shakespeare 'KING: what news?' a DCFormer and a text (or a file of text, or its test text)

Writes PNG files and one interactive page, index.html, that needs nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "see which tokens form a group and which keys it chose"

TEST_IMAGES = 3


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="RUN | IMAGE | TEXT",
        help="a run folder, then picture files (with --model picture files only), or a text for a language model",
    )
    parser.add_argument("--model", help="a model by name, with random weights, instead of a run")
    parser.add_argument(
        "--size", type=int, help="short side in pixels that pictures are brought to (default: that of training)"
    )
    parser.add_argument("--out", type=Path, help="folder to write into (default: RUN/inspect, or inspect-MODEL)")


def run(args: argparse.Namespace) -> int:
    """Look at the pictures and write the page."""
    from coterie.inspect.explore import explore, summary
    from coterie.inspect.groups import explain_no_groups
    from coterie.inspect.network import open_image, open_model, open_run

    if args.model is None and args.inputs and _is_language_model(Path(args.inputs[0])):
        return _inspect_text(args)
    if args.size is not None and not 8 <= args.size <= 4096:
        raise ValueError(f"--size: got {args.size}, takes 8 to 4096 pixels")
    if args.model is None and not args.inputs:
        raise ValueError(
            "takes a run folder and pictures (coterie inspect RUN IMAGE), or a model's name (--model NAME IMAGE)"
        )
    if args.model is not None:
        # Pictures are read before the model is built: a wrong path should not cost the wait.
        images = [(path, open_image(path)) for path in args.inputs] or [_photograph()]
        network = open_model(args.model, args.size)
        out = args.out or Path(f"inspect-{args.model.replace('/', '-').replace(':', '-')}")
    else:
        folder, *paths = args.inputs
        images = [(path, open_image(path)) for path in paths]
        network = open_run(folder)
        if args.size is not None:
            network.size = (args.size, args.size)
        images = images or _test_images(folder)
        out = args.out or Path(folder, "inspect")
    images = [(Path(name).name or name, image) for name, image in images]
    written = explore(network, images, out, progress=_progress)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    for name, view, files in written.views:
        print(f"{name}: {view.picture.shape[1]}×{view.picture.shape[0]} pixels")
        if network.trained and len(view.probabilities) == len(network.classes):
            best = int(view.probabilities.argmax())
            print(f"  the network says: {network.classes[best]} ({view.probabilities[best]:.1%})")
        for line in summary(view):
            print(f"  {line}")
        if files:
            print(f"  {len(files)} pictures: {files[0].parent}/{files[0].name} …")
    if not network.has_groups:
        print(explain_no_groups(network.model))
    print(f"page: {written.page}")
    return 0


def _is_language_model(folder: Path) -> bool:
    from coterie.inspect.runs import check_run, read_run

    return read_run(check_run(folder)).target == "text"


def _inspect_text(args: argparse.Namespace) -> int:
    from coterie.inspect.composition import inspect_run, summary

    folder, *texts = args.inputs
    if len(texts) > 1:
        raise ValueError(f"takes one text, or the path of one file, after the run; got {len(texts)}")
    text = texts[0] if texts else None
    if text is not None and len(text) < 256 and Path(text).is_file():
        text = Path(text).read_text("utf-8")
    layers, written = inspect_run(Path(folder), text, args.out or Path(folder, "inspect"))
    print("how strongly heads compose, relative to the identity:")
    for line in summary(layers):
        print(f"  {line}")
    print(f"page: {written}")
    return 0


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[Kdrawing {message}", end="", file=sys.stderr, flush=True)


def _test_images(folder: str) -> list:
    """A few pictures of the run's own test split."""
    from coterie.data import open_data
    from coterie.inspect.report_groups import choose_samples
    from coterie.inspect.results import sample_picture
    from coterie.inspect.runs import read_run

    run = read_run(folder)
    spec = run.data
    if spec is None:
        raise ValueError(
            f"run: {folder} does not say what data it was trained on; give pictures: coterie inspect {folder} IMAGE"
        )
    source = open_data(spec, target=run.target)
    found = [(f"test {index}", sample_picture(source, index)[0]) for index in choose_samples(run, source)[:TEST_IMAGES]]
    images = [(name, image) for name, image in found if image is not None]
    if not images:
        raise ValueError(f"run: no test picture of {spec} can be read; give pictures: coterie inspect {folder} IMAGE")
    return images


def _photograph() -> tuple:
    """The photograph of a temple that scikit-learn ships, 640×427."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return "china.jpg", Image.fromarray(load_sample_image("china.jpg"))
