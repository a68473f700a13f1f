"""What a person sees while a run goes on: a live line on a terminal, plain lines on a pipe."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_EVERY_SECONDS = 5.0


class Progress:
    """Shows loss, learning rate, speed and time left; silent on all ranks but the main one.

    Use as a context manager around the loop.
    """

    def __init__(self, steps: int, done: int, *, unit: str = "images", visible: bool = True) -> None:
        self._steps, self._first, self._unit = steps, done, unit
        self._start = self._last_line = time.monotonic()
        self._visible = visible
        self._live: Any = None
        if visible and sys.stdout.isatty():
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Live

            self._live = Live(
                TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(),
                TextColumn("{task.fields[status]}"),
            )  # fmt: skip
            self._task = self._live.add_task("starting", total=steps, completed=done, status="")

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def step(self, step: int, epoch: int, epochs: int) -> None:
        """Move the bar to `step` steps done."""
        if self._live:
            self._live.update(self._task, completed=step, description=f"epoch {epoch + 1}/{epochs}")

    def status(self, step: int, epoch: int, epochs: int, values: dict[str, float]) -> None:
        """Show the latest figures, at most every few seconds on a pipe."""
        text = (f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
                f"{values[f'{self._unit}_per_s']:.0f} {self._unit}/s  {self.time_left(step)} left")  # fmt: skip
        if self._live:
            self._live.update(self._task, status=text)
        elif self._visible and time.monotonic() - self._last_line >= PLAIN_EVERY_SECONDS:
            self._last_line = time.monotonic()
            print(f"epoch {epoch + 1}/{epochs}  step {step}/{self._steps}  {text}", flush=True)

    def line(self, text: str) -> None:
        """Print a line that stays."""
        if self._live:
            self._live.console.print(text, highlight=False, markup=False)
        elif self._visible:
            print(text, flush=True)

    def time_left(self, step: int) -> str:
        """Time to the end at the pace so far, as h:mm:ss."""
        done = step - self._first
        if done <= 0:
            return "?"
        seconds = round((time.monotonic() - self._start) / done * (self._steps - step))
        return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
