"""Vision models here against their authors' own code, on the CPU: time of an inference call and of a training step.

    git clone https://github.com/rayleizhu/BiFormer && git -C BiFormer checkout 1697bbb
    python benchmarks/vision_authors.py biformer BiFormer --model biformer_tiny=tiny --size 224 --batch 8
    python benchmarks/vision_authors.py biformer BiFormer --model biformer_tiny=tiny --size 224 --batch 4 --train

The authors' network is built by `authors_model` of tests/golden/make_SYSTEM.py, which says what it needs and which
commit is meant. Both get the same weights, by `load_authors_checkpoint`'s mapping, and the same images; before anything
is timed their outputs are compared. Both take turns in one process. A training step is forward and backward, without
stochastic depth.
"""

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from coterie.bench.conditions import conditions
from coterie.bench.timing import Settings, alternate
from coterie.models import create_model

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def authors_model(system: str, checkout: Path, variant: str, **options: object) -> nn.Module:
    """Their network, by the script that makes the golden figures."""
    path = GOLDEN / f"make_{system}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem.removeprefix("make_") for p in GOLDEN.glob("make_*.py")))
        raise SystemExit(f"there is no {path.name}; systems with authors' models: {known}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(GOLDEN))
    spec.loader.exec_module(module)
    return module.authors_model(checkout, variant, **options)


def option(text: str) -> tuple[str, object]:
    """KEY=VALUE, the value a number, True, False, a pair of numbers (224x320) or a word."""
    key, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    if value in ("True", "False"):
        return key, value == "True"
    if all(part.isdigit() for part in value.split("x")):
        numbers = tuple(int(part) for part in value.split("x"))
        return key, numbers[0] if len(numbers) == 1 else numbers
    return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="as in tests/golden/make_SYSTEM.py")
    parser.add_argument("checkout", type=Path, metavar="FOLDER", help="a checkout of the authors' repository")
    parser.add_argument("--model", required=True, metavar="OURS=THEIRS", help="our name, and theirs in that script")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="time a step of training instead of inference")
    parser.add_argument("--deterministic", action="store_true", help="torch.use_deterministic_algorithms")
    parser.add_argument("--authors", type=option, nargs="*", default=[], metavar="KEY=VALUE", help="for their model")
    parser.add_argument("--ours", type=option, nargs="*", default=[], metavar="KEY=VALUE", help="for our model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=25.0, help="seconds of timing; three rounds are run anyway")
    args = parser.parse_args()
    if not args.checkout.is_dir():
        parser.error(f"{args.checkout} is no folder: give a checkout of the authors' repository")
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.deterministic)
    torch.manual_seed(0)
    name, _, variant = args.model.partition("=")
    ours = create_model(name, **dict(args.ours))
    theirs = authors_model(args.system, args.checkout, variant or name, **dict(args.authors))
    ours.load_state_dict(ours.from_authors(theirs.state_dict())[0])
    images = torch.randn(args.batch, 3, args.size, args.size)
    for model in (ours, theirs):
        model.eval()
    with torch.no_grad():
        expected, found = theirs(images[:1]), ours(images[:1])
    error = float((found - expected).norm() / expected.norm())
    what = f"{args.size}x{args.size}, batch {args.batch}, {'training step' if args.train else 'inference'}, float32"
    print(f"{args.model}, {what}; outputs differ by {error:.1e} relative", flush=True)
    calls = {"coterie": make_call(ours, images, args.train), "authors": make_call(theirs, images, args.train)}
    compare(calls, args.time_limit)
    print(machine())


def compare(calls: dict[str, Callable[[], object]], time_limit: float) -> None:
    """A line each: seconds, and their ratio to the first contender's, round by round."""
    timings = alternate(calls, Settings(time_limit=time_limit)).timings
    first = next(iter(timings))
    for contender, timing in timings.items():
        low, high = timing.quartiles
        ratio = statistics.median(a / b for a, b in zip(timing.samples, timings[first].samples, strict=True))
        print(
            f"{contender:<10}{timing.median:>9.4f} s   {low:.4f} .. {high:.4f} s   {len(timing.samples)} rounds   "
            f"{ratio:.2f}x {first}",
            flush=True,
        )


def machine() -> str:
    seen = conditions(torch.device("cpu"))
    return f"{seen['cpu']}, {seen['threads']} threads, torch {seen['versions']['torch']}, {seen['date']}"


def make_call(model: nn.Module, images: Tensor, train: bool) -> Callable[[], object]:
    """One forward pass without gradient, or a forward and a backward pass."""
    if not train:

        def infer() -> Tensor:
            with torch.inference_mode():
                return model(images)

        return infer
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> object:
        return torch.autograd.grad(model(images).square().mean(), parameters, allow_unused=True)

    return step


if __name__ == "__main__":
    main()
