"""Run by two processes (`accelerate launch`): trains each dense task into a folder of its own."""

import sys
from pathlib import Path

from accelerate import Accelerator
from dense_runs import TASKS, dense, write_set

from coterie.engine import train

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for task in TASKS:
        with accelerator.main_process_first():
            data = write_set(folder / f"{task}-set", task)
        train(dense(task, data, folder / task))
