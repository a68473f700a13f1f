"""timm's DaViT and EfficientViT as they are, and with our mechanisms in place of their attention, on the CPU.

    python benchmarks/timm_replaced.py efficientvit_m4 cascaded_group --size 224 --batch 8          # and --train
    python benchmarks/timm_replaced.py davit_tiny channel_group shifted_window --size 1024 --train --parts

Both hold the same weights; before anything is timed their outputs are compared. Both take turns in one process. A
training step is forward and backward. With --parts every attention is timed by itself as well, on a map of the size
that it sees in the model: the rest of the model is the same code in both.
"""

import argparse
import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn
from vision_authors import compare, machine, make_call

from coterie.attention import list_attention, replace_attention


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name in timm: davit_* or efficientvit_m*")
    parser.add_argument("attention", nargs="+", choices=list_attention(), metavar="NAME", help="what to put in")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--train", action="store_true", help="time a step of training instead of inference")
    parser.add_argument("--parts", action="store_true", help="time every attention by itself as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=25.0, help="seconds of timing, per case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    theirs = timm.create_model(args.model, num_classes=10).eval()
    ours, swapped = copy.deepcopy(theirs), []
    for name in args.attention:
        swapped += replace_attention(ours, name).swapped
    if not swapped:
        parser.error(f"nothing in {args.model} gives way to {', '.join(args.attention)}")
    images = torch.randn(args.batch, 3, args.size, args.size)
    with torch.no_grad():
        expected, found = theirs(images[:1]), ours(images[:1])
    error = float((found - expected).norm() / expected.norm())
    what = f"{args.size}x{args.size}, batch {args.batch}, {'training step' if args.train else 'inference'}, float32"
    print(f"{args.model}, {what}; {len(swapped)} swapped, outputs differ by {error:.1e} relative", flush=True)
    compare(
        {"ours": make_call(ours, images, args.train), "timm": make_call(theirs, images, args.train)}, args.time_limit
    )
    if args.parts:
        inputs = inputs_of(theirs.eval(), swapped, images)
        for name in swapped:
            call = inputs[name]
            print(f"{name} {tuple(call[0].shape)}", flush=True)
            parts = {
                who: part_call(model.get_submodule(name), call, args.train)
                for who, model in (("ours", ours), ("timm", theirs))
            }
            compare(parts, args.time_limit)
    print(machine())


def inputs_of(model: nn.Module, names: list[str], images: Tensor) -> dict[str, tuple[Any, ...]]:
    """What each of these modules is called with, in the memory layout that it comes in."""
    seen: dict[str, tuple[Any, ...]] = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given))
    with torch.no_grad():
        model(images)
    return seen


def part_call(part: nn.Module, given: tuple[Any, ...], train: bool) -> Any:
    """One call without gradient, or a forward and a backward pass down to the input."""
    part.train(train)
    if not train:

        def infer() -> Tensor:
            with torch.inference_mode():
                return part(*given)

        return infer
    x = given[0].clone(memory_format=torch.preserve_format).requires_grad_()
    wanted = [x, *part.parameters()]

    def step() -> object:
        return torch.autograd.grad(part(x, *given[1:]).square().mean(), wanted, allow_unused=True)

    return step


if __name__ == "__main__":
    main()
