"""List what there is, by name.

examples:
  coterie list              everything
  coterie list models       models of this library; any timm model works too
  coterie list attention    the mechanisms, and what each can do
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coterie.attention import GridAttention

HELP = "list models, attention mechanisms, operations, data and tasks"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", nargs="?", choices=tuple(_LISTS), help="list only these")


def run(args: argparse.Namespace) -> int:
    """Print the names; under headings where there is more than one kind."""
    for kind in [args.what] if args.what else _LISTS:
        if not args.what:
            print(f"{kind}:")
        for line in _LISTS[kind]():
            print(line if args.what else f"  {line}")
    return 0


def _models() -> list[str]:
    from coterie.models import list_models

    return list_models()


def _attention() -> list[str]:
    from coterie.attention import attention_class, list_attention

    names = list_attention()
    width = max(map(len, names))
    lines = []
    for name in names:
        mechanism = attention_class(name)
        lines += [f"{name:<{width}}  {_summary(mechanism)}", f"{'':<{width}}    {_abilities(mechanism)}"]
    return lines


def _abilities(mechanism: type[GridAttention]) -> str:
    """Grids, patterns, masks and backends, in a line."""
    from coterie.attention import PATTERNS
    from coterie.ops import operations

    grids = "/".join(map(str, sorted(mechanism.grid_dims)))
    patterns = ", ".join(p.removeprefix("bidirectional ") for p in PATTERNS if p in mechanism.patterns)
    operation = operations().get(mechanism.operation)
    backends = "torch" if operation is None else ", ".join(backend.name for backend in operation.backends)
    return f"{grids}-dimensional grids; {patterns}; padding masks; {mechanism.operation}: {backends}"


def _ops() -> list[str]:
    import coterie.ops

    functions = [getattr(coterie.ops, name) for name in coterie.ops.__all__]
    on_tensors = [
        f for f in functions if inspect.isfunction(f) and next(iter(inspect.signature(f).parameters), "") == "query"
    ]
    return [f"{function.__name__:<24}  {_summary(function)}" for function in on_tensors]


def _data() -> list[str]:
    return [
        "classification",
        "  digits               1,797 handwritten digits, 8x8 (in scikit-learn)",
        "  folder:PATH          one folder of pictures per class, or train/ and test/ with such folders",
        "  parquet:PATH         as Hugging Face datasets writes it",
        "  hf:NAME              a set on the Hugging Face hub",
        "  webdataset:PATTERN   shards, for example webdataset:data/train-{000..009}.tar",
        "segmentation and detection",
        "  digit-scenes         handwritten digits on photographs: label maps, boxes, masks (from scikit-learn)",
        "  coco:PATH            COCO json: boxes, masks",
        "  voc:PATH             Pascal VOC: boxes, label maps",
        "  maps:PATH            pictures, and a label map for each",
        "  parquet:PATH         pictures with label maps, or with objects",
    ]


def _tasks() -> list[str]:
    from coterie.tasks import list_tasks

    return list_tasks()


def _summary(thing: object) -> str:
    return (getattr(thing, "__doc__", None) or "").strip().split("\n", 1)[0]


_LISTS: dict[str, Callable[[], list[str]]] = {
    "models": _models,
    "attention": _attention,
    "ops": _ops,
    "data": _data,
    "tasks": _tasks,
}
