"""Telling people: progress on standard error, tables on standard output; rich on a terminal, plain lines on a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TextIO

from coterie.bench.timing import Settings, Timing


class Progress:
    """Says on standard error what is being measured: one live line on a terminal, one line per stage on a pipe."""

    def __init__(self, stream: TextIO | None = None, *, silent: bool = False) -> None:
        self._stream = stream or sys.stderr
        self._silent = silent
        self._status: Any = None
        self._last = ""

    def __enter__(self) -> Progress:
        if not self._silent and self._stream.isatty():
            try:
                from rich.console import Console
            except ImportError:
                return self
            self._status = Console(file=self._stream).status("starting")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def stage(self, text: str) -> None:
        """A new thing is being done."""
        self._last = text
        if self._silent:
            return
        if self._status is not None:
            self._status.update(text)
        else:
            print(f"bench: {text}", file=self._stream, flush=True)

    def rounds(self, label: str, settings: Settings) -> Callable[[int, dict[str, Timing]], None]:
        """For `alternate(on_round=...)`: counts the rounds and shows how precise the medians are."""
        self.stage(f"{label}: timing")

        def on_round(done: int, timings: dict[str, Timing]) -> None:
            if self._status is not None:
                worst = max(timing.precision for timing in timings.values())
                self._status.update(
                    f"{label}: round {done}, medians known to {worst:.1%} (stops at {settings.precision:.1%})"
                )

        return on_round


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO | None = None
) -> None:
    """A table: the first column is text, the others are figures and stand right."""
    stream = stream or sys.stdout
    if stream.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            table = Table(title=title, title_justify="left")
            for index, column in enumerate(columns):
                table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
            for row in rows:
                table.add_row(*row)
            Console(file=stream).print(table)
            return
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    print(title, file=stream)
    for row in [columns, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip(), file=stream)


def seconds(value: float | None) -> str:
    """A duration with three digits and a fitting unit."""
    if value is None:
        return "-"
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{_three_digits(value * factor)} {unit}"
    return f"{_three_digits(value)} s"


def megabytes(value: int | None) -> str:
    """Bytes as MiB."""
    return "-" if value is None else f"{_three_digits(value / 2**20)} MiB"


def number(value: float | None, suffix: str = "") -> str:
    """Three digits and a suffix."""
    return "-" if value is None else f"{_three_digits(value)}{suffix}"


def _three_digits(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
