"""The operations that `coterie bench` knows. A new mechanism is one file in `mechanisms` with a
`register_op(BenchOp(...))`.

An entry says how to make inputs, who contends (the baseline first), what each contender computes and how many FLOPs
that takes, and gives for everything computed an oracle: plain torch on chosen query rows, from which the check before
the timing takes what is right.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from coterie.bench.conditions import DTYPES, open_device, open_dtype

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One set of shapes: what the figures of one table block were measured on. `options` are the operation's own
    sizes."""

    tokens: int
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    options: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "heads", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        open_dtype(self.dtype)

    @property
    def torch_device(self) -> torch.device:
        return open_device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, and what `Case(**...)` takes."""
        return asdict(self)


@dataclass(frozen=True)
class Option:
    """A size of an operation's own: its default, its smallest value, what it means."""

    default: float
    least: float
    help: str

    def check(self, name: str, value: float) -> float:
        """`value` in the type of the default.

        Raises:
            ValueError: below the smallest value, or a fraction where a whole number is taken.
        """
        if isinstance(self.default, int) and value != int(value):
            raise ValueError(f"{name} must be a whole number, got {value:g}")
        if value < self.least:
            raise ValueError(f"{name} must be at least {self.least:g}, got {value:g}")
        return type(self.default)(value)


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Args:
        name: in the table; of a backend of ours, the name that `--backends` takes.
        run: called with the inputs by name, returns (batch, heads, queries, value_dim).
        computes: which of the operation's oracles says what is right.
        flops: floating-point operations of a case; called with (case, backward), backward=True meaning forward and
            backward.
        growth: the power of the number of tokens with which time grows, for predicting the time at the next size.
        memory: bytes beyond the inputs at the worst moment, where that is quadratic and must be refused before it
            hurts.
        reads: the inputs that it reads, where those are not all: the others get no gradient from it.
    """

    name: str
    run: Callable[..., Tensor]
    computes: str
    flops: Callable[[Case, bool], int]
    growth: int
    memory: Callable[[Case], int] | None = None
    reads: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BenchOp:
    """An operation that can be measured.

    Args:
        name: what `coterie bench op` takes.
        summary: one line.
        options: its own sizes by name.
        make_inputs: seeded inputs of a case, by name, on the case's device and in its dtype.
        differentiable: the inputs whose gradients the backward pass makes, as far as a case has them.
        baseline: what the others are compared with.
        backends: every backend of a case by name, as a contender or as the sentence why it cannot run.
        default_backends: the names measured unless others are asked for; those that cannot run are left out.
        oracles: by the name in `Contender.computes`: (case, inputs, rows) -> the output rows `rows` (a 1-d index over
            queries), by plain differentiable torch in the dtype of the inputs.
        auto: the name that backend="auto" stands for in a case.
        warm_up_tokens: few tokens, but enough that a contender takes the same path as with many.
    """

    name: str
    summary: str
    options: dict[str, Option]
    make_inputs: Callable[[Case], Inputs]
    differentiable: tuple[str, ...]
    baseline: Contender
    backends: Callable[[Case, bool], dict[str, Contender | str]]
    default_backends: tuple[str, ...]
    oracles: dict[str, Callable[[Case, Inputs, Tensor], Tensor]]
    auto: Callable[[Case, bool], str]
    warm_up_tokens: Callable[[Case], int] = lambda case: 64

    def wanted(self, contender: Contender, inputs: Inputs) -> list[str]:
        """The inputs whose gradients the backward pass of `contender` makes."""
        reads = inputs if contender.reads is None else contender.reads
        return [name for name in self.differentiable if name in inputs and name in reads]

    def case(self, **sizes: Any) -> Case:
        """A case with this operation's options completed by their defaults and checked.

        Raises:
            ValueError: a size is too small, an option is not this operation's, the dtype or device is unknown.
        """
        given = dict(sizes.pop("options", {}))
        if wrong := sorted(set(given) - set(self.options)):
            takes = ", ".join(sorted(self.options)) or "none"
            raise ValueError(f"{self.name} has no option {', '.join(map(repr, wrong))}; it takes {takes}")
        options = {
            name: option.check(name, given[name]) if name in given else option.default
            for name, option in self.options.items()
        }
        return Case(options=options, **sizes)


_OPS: dict[str, BenchOp] = {}


def register_op(op: BenchOp) -> BenchOp:
    """Make `op` known to `coterie bench`.

    Raises:
        ValueError: the name is taken.
    """
    if op.name in _OPS:
        raise ValueError(f"an operation named {op.name!r} is registered already")
    _OPS[op.name] = op
    return op


def list_ops() -> list[str]:
    """Names of the operations that can be measured."""
    import coterie.bench.mechanisms  # noqa: F401  (fills the registry)

    return sorted(_OPS)


def get_op(name: str) -> BenchOp:
    """The operation of that name.

    Raises:
        ValueError: unknown; the message lists the known ones.
    """
    known = list_ops()
    if name not in _OPS:
        raise ValueError(f"unknown operation {name!r}{suggest(name, known)}; known: {', '.join(known)}")
    return _OPS[name]


def suggest(name: str, known: list[str]) -> str:
    """', did you mean ...?' where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
