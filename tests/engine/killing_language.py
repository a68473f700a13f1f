"""Trains a language model in child processes and kills them with SIGKILL: killing_language.py RUN_DIR TEXT STEP ..."""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torchmetrics  # noqa: F401  imported here, so that no child has to
from language_run import language

from coterie.engine import checkpoint, train
from coterie.engine.loop import Trainer


def start(run_dir: Path, text: Path, resume: bool, stop: int | None) -> int:
    """Fork a child that trains and stands still before the step `stop`; returns its process number."""
    child = os.fork()
    if child:
        return child
    original = Trainer._train_step

    def until(trainer: Trainer, batch: dict) -> None:
        if trainer.step == stop:
            (run_dir / f"at-{stop}").touch()
            time.sleep(200)
        original(trainer, batch)

    Trainer._train_step = until  # type: ignore[method-assign]
    try:
        train(language(run_dir, text, optim__ema_decay=0.9, output__checkpoint_every=5), resume=resume)
    except BaseException as error:
        print(f"child: {error!r}", flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    """See the module's docstring."""
    run_dir, text, steps = Path(sys.argv[1]), Path(sys.argv[2]), [int(step) for step in sys.argv[3:]]
    for number, step in enumerate(steps):
        child = start(run_dir, text, number > 0, step)
        while not (run_dir / f"at-{step}").exists():
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                raise SystemExit(f"the run ended before step {step}")
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert checkpoint.latest(run_dir / "checkpoints") is not None
        print(f"killed after step {step}", flush=True)
    child = start(run_dir, text, True, None)
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
