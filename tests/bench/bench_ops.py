"""A small operation for the tests of the bench, with backends that are right, wrong, broken or unavailable."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from coterie.bench import BenchOp, Case, Contender, get_op
from coterie.bench.mechanisms.exact import EXACT, exact_attention_rows, exact_flops


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return exact_attention_rows(query, key, value, torch.arange(query.shape[2]))


def too_sharp(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return plain(query * 1.01, key, value)


def wrong_gradient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return plain(query, key, value * 1.5 - value.detach() * 0.5)


def not_a_number(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return plain(query, key, value) * float("nan")


def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("the kernel does not like this\nand says so at length")


def greedy(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 EiB")


def contender(run: Callable[..., Tensor], growth: int = 2) -> Contender:
    return Contender(run.__name__, run, "exact attention", exact_flops, growth=growth)


def make_op(*runs: Callable[..., Tensor], growth: int = 2, **unavailable: str) -> BenchOp:
    """An entry whose backends are `runs`, and those of `unavailable` with the reason."""

    def backends(case: Case, backward: bool) -> dict[str, Contender | str]:
        return {run.__name__: contender(run, growth) for run in runs} | dict(unavailable)

    names = (*(run.__name__ for run in runs), *unavailable)
    return replace(
        get_op("global"),
        name="trial",
        baseline=EXACT,
        backends=backends,
        default_backends=names,
        auto=lambda case, backward: names[0],
    )
