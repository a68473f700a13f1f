"""Trains in child processes, kills them with SIGKILL at given moments, and resumes.

    python killing.py RUN_DIR MOMENT ...

A moment is `start` (before the first step), `writing` (while a checkpoint is being written), `step:N` (after the line
of step N was logged), or `finishing` (while the final weights are being written). After the last one the run is resumed
to its end. Children are forked, so that the imports are paid for once.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torchmetrics  # noqa: F401  imported here, so that no child has to
from tiny_run import tiny

import coterie.models  # noqa: F401
from coterie.engine import train
from coterie.engine.logs import read_events

CHANGES = {
    "train__epochs": 3,
    "train__batch_size": 256,
    "output__log_every": 3,
    "output__checkpoint_every": 2,
    "optim__ema_decay": 0.9,
    "model__drop_path": 0.3,
    "augment__mixup": 0.2,
    "augment__label_smoothing": 0.1,
}


def start(run_dir: Path, resume: bool) -> int:
    """Fork a child that trains; returns its process number."""
    child = os.fork()
    if child == 0:
        try:
            train(tiny(run_dir, **CHANGES), resume=resume)
        except BaseException as error:
            print(f"child: {error!r}", flush=True)
            os._exit(1)
        os._exit(0)
    return child


def reached(run_dir: Path, moment: str) -> bool:
    """Whether the run has come to `moment`."""
    if moment == "start":
        return (run_dir / "config.yaml").exists()
    if moment == "writing":
        return any((run_dir / "checkpoints").glob(".tmp-step-*"))
    if moment == "finishing":
        return any(run_dir.glob(".tmp-model.safetensors-*")) or any(run_dir.glob("model.safetensors"))
    return any(event["step"] >= int(moment.removeprefix("step:")) for event in read_events(run_dir))


def kill_at(run_dir: Path, moment: str, resume: bool) -> None:
    """Train until `moment`, then SIGKILL; where the moment slipped by, try again."""
    for _ in range(20):
        child = start(run_dir, resume)
        while not reached(run_dir, moment):
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                raise SystemExit(f"the run ended before {moment}")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        resume = True
        if moment != "writing" or reached(run_dir, moment):  # a half-written checkpoint is really there
            print(f"killed at {moment}", flush=True)
            return
    raise SystemExit(f"never killed at {moment}")


def main() -> None:
    """See the module's docstring."""
    run_dir, moments = Path(sys.argv[1]), sys.argv[2:]
    for number, moment in enumerate(moments):
        kill_at(run_dir, moment, resume=number > 0)
    child = start(run_dir, resume=bool(moments))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    raise SystemExit(code)


if __name__ == "__main__":
    main()
