"""Choosing an implementation of an operation, and telling why.

Every operation lists its backends in the order in which `backend="auto"` tries them. A backend states in one sentence
why it
cannot serve a call, or `None` if it can. A backend asked for by name never falls back to another one.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.ops._state import exporting


class BackendUnavailable(ValueError):
    """A backend was asked for by name and cannot serve this call."""


@dataclass(frozen=True)
class Call:
    """What a backend may look at before it accepts: no tensor data, so that the choice is made while tracing."""

    device: str
    dtype: torch.dtype
    head_dim: int
    needs_grad: bool = False
    exporting: bool = False

    @classmethod
    def of(cls, *tensors: Tensor) -> "Call":
        """Describe a call by its floating tensors: device and dtype of the first, the largest head_dim of all."""
        return cls(
            device=tensors[0].device.type,
            dtype=tensors[0].dtype,
            head_dim=max(t.shape[-1] for t in tensors),
            needs_grad=torch.is_grad_enabled() and any(t.requires_grad for t in tensors),
            exporting=exporting(),
        )


@dataclass(frozen=True)
class Backend:
    """One implementation: `refusal(call)` is None or one sentence; `summary` says what it is."""

    name: str
    summary: str
    refusal: Callable[[Call], str | None]
    only_by_name: bool = False


@dataclass(frozen=True)
class Operation:
    """An operation's backends, in the order in which `auto` tries them."""

    name: str
    backends: tuple[Backend, ...]
    describe: Callable[..., Call]

    def choose(self, backend: str, call: Call) -> str:
        """The name of the backend that serves `call`.

        Raises:
            ValueError: `backend` is no backend of this operation.
            BackendUnavailable: it was asked for by name and cannot serve this call.
        """
        if not isinstance(backend, str):
            raise TypeError(f"{self.name}: backend must be a str, got {type(backend).__name__}")
        source = "backend"
        if backend == "auto":
            override = os.environ.get("COTERIE_BACKEND", "")
            if override and override != "auto":
                backend, source = override, "COTERIE_BACKEND"
        if backend == "auto":
            for candidate in self.backends:
                if not candidate.only_by_name and candidate.refusal(call) is None:
                    return candidate.name
            raise BackendUnavailable(f"{self.name}: no backend can serve {call}")
        for candidate in self.backends:
            if candidate.name == backend:
                reason = candidate.refusal(call)
                if reason is not None:
                    raise BackendUnavailable(f"{self.name}: {source}={backend!r} cannot serve this call: {reason}")
                return backend
        known = ", ".join(repr(b.name) for b in self.backends)
        raise ValueError(f"{self.name}: unknown {source} {backend!r}; it takes 'auto', {known}")

    def explain(self, call: Call, backend: str = "auto") -> "Explanation":
        """What would run for `call`, and why each other backend would not."""
        chosen = self.choose(backend, call)
        rows = []
        for candidate in self.backends:
            reason = candidate.refusal(call)
            if candidate.name == chosen:
                reason = f"runs: {candidate.summary}"
            elif reason is None and candidate.only_by_name:
                reason = f"only when asked for by name: {candidate.summary}"
            elif reason is None:
                reason = f"can serve this call, but {chosen!r} was {'preferred' if backend == 'auto' else 'asked for'}"
            rows.append((candidate.name, reason))
        return Explanation(self.name, chosen, call, tuple(rows))


@dataclass(frozen=True)
class Explanation:
    """What would run for a call: `chosen`, and one sentence for every backend in `reasons`."""

    operation: str
    chosen: str
    call: Call
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.reasons)
        head = f"{self.operation} on {self.call.device}, {str(self.call.dtype).removeprefix('torch.')}: {self.chosen}"
        return "\n".join(
            [head, *(f"  {'->' if n == self.chosen else '  '} {n:<{width}}  {why}" for n, why in self.reasons)]
        )


_OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Make an operation known to `explain`, `coterie info` and `coterie list ops`."""
    _OPERATIONS[operation.name] = operation
    return operation


def operations() -> dict[str, Operation]:
    """All operations that take a `backend`, by name."""
    return dict(_OPERATIONS)


def explain(op: str | Callable[..., Any], *args: Any, backend: str = "auto", **kwargs: Any) -> Explanation:
    """Tell which backend an operation would run for these inputs, and one sentence why each other would not.

    Args:
        op: the function (`coterie.ops.dynamic_group_attention`) or its name.
        *args, **kwargs: the arguments of the call; only device, dtype, shapes and `requires_grad` are looked at.
        backend: what the call would be given as `backend`.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPERATIONS:
        raise ValueError(f"explain: unknown operation {name!r}; known are {', '.join(sorted(_OPERATIONS))}")
    operation = _OPERATIONS[name]
    return operation.explain(operation.describe(*args, **kwargs), backend)
