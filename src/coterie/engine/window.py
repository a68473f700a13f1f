"""The steps since the last line of the log: their losses, their gradient norms, and how long they took."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coterie.engine.distributed import mean_over_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient became NaN or infinite; the message has the step, the last good checkpoint, a hint."""


class NonFiniteStep(ArithmeticError):
    """`what` ("loss" or "gradient") became `value`, `back` steps before the latest one (0: at the latest)."""

    def __init__(self, what: str, value: float, back: int) -> None:
        super().__init__(what, value, back)
        self.what, self.value, self.back = what, value, back


class Window:
    """Collects steps without waiting for the device; `fetch` waits."""

    def __init__(self, accelerator: Accelerator, unit: str = "images") -> None:
        self._accelerator, self._unit = accelerator, unit
        self._numbers: list[tuple[float, float]] = []
        self._tensors: list[Tensor] = []
        self._new_steps = 0
        self._start, self._paused = time.monotonic(), 0.0

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """One step: its loss and the norm of its gradient, as scalars on the device."""
        self._tensors.append(torch.stack([loss.float(), norm.float()]))
        self._new_steps += 1

    def fetch(self) -> list[tuple[float, float]]:
        """(loss, gradient norm) of every step, losses as the mean of all ranks.

        Raises:
            NonFiniteStep: one of them is NaN or infinite; the exact step is known although nobody looked at the time.
        """
        if self._tensors:
            values = mean_over_ranks(self._accelerator, torch.stack(self._tensors)).tolist()
            self._tensors.clear()
            for number, (loss, norm) in enumerate(values):
                back = len(values) - 1 - number
                if not math.isfinite(loss):
                    raise NonFiniteStep("loss", loss, back)
                # In fp16 an infinite norm is routine: the loss scale was too high, and the step was skipped.
                if not math.isfinite(norm) and self._accelerator.scaler is None:
                    raise NonFiniteStep("gradient", norm, back)
                self._numbers.append((loss, norm))
        return self._numbers

    def restore(self, numbers: list[tuple[float, float]]) -> None:
        """Put back what `fetch` gave when a checkpoint was written."""
        self._numbers = [(loss, norm) for loss, norm in numbers]

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count as training time."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    def close(self, units: int) -> dict[str, float]:
        """The figures of the window, and a new window; a step handled so many `units` (images, tokens)."""
        losses, norms = zip(*self.fetch(), strict=True)
        seconds = max(time.monotonic() - self._start - self._paused, 1e-9)
        figures = {
            "loss": sum(losses) / len(losses),
            f"{self._unit}_per_s": round(self._new_steps * units / seconds, 1),
        }
        if finite := [norm for norm in norms if math.isfinite(norm)]:
            figures["grad_norm"] = sum(finite) / len(finite)
        self._numbers, self._new_steps = [], 0
        self._start, self._paused = time.monotonic(), 0.0
        return figures
