"""The log of a run: `metrics.jsonl` for programs and TensorBoard for people.

One line of JSON per event, each with its step. When a run is resumed from a checkpoint, events after the checkpoint's
step are dropped first, because the run is about to log them again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coterie.engine.files import StorageError, atomic_write


class Logs:
    """Writes events; `after_step` is the step of the checkpoint that the run goes on from (0 for a new run)."""

    def __init__(self, run_dir: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run_dir / "metrics.jsonl"
        earlier = [event for event in read_events(run_dir) if event["step"] <= after_step] if after_step else []
        atomic_write(self._path, "".join(json.dumps(event) + "\n" for event in earlier))
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_step + 1 if after_step else None)

    def write(self, event: str, step: int, epoch: float, **values: Any) -> None:
        """Append one event; numbers also go to TensorBoard as `event/name`."""
        line = json.dumps({"event": event, "step": step, "epoch": epoch, **values})
        try:
            with open(self._path, "a") as file:
                file.write(line + "\n")
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{event}/{name}", value, step)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}; checkpoints are intact") from error

    def close(self) -> None:
        """Flush TensorBoard's file."""
        self._board.close()


def read_events(run_dir: str | Path) -> list[dict[str, Any]]:
    """All events of a run in order; a last line that a kill cut short is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    events = []
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
