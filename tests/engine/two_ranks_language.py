"""Run by two processes (`accelerate launch`): trains a language model into a folder."""

import sys
from pathlib import Path

from language_run import language

from coterie.engine import train

if __name__ == "__main__":
    train(language(Path(sys.argv[1]), Path(sys.argv[2]), optim__ema_decay=0.9, output__checkpoint_every=5))
