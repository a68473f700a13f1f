"""Let a trained language model go on with a text.

examples:
  coterie generate runs/documentation-language-modeling                      it begins a document of its own
  coterie generate runs/shakespeare-dcformer --prompt 'KING:' --max-new-tokens 300 --stream
  coterie generate RUN --prompt 'The list' --num-samples 3 --temperature 0.7 --top-p 0.95 --seed 1
  coterie generate RUN --prompt-file letter.txt --temperature 0              the most probable token every time
  coterie generate RUN --prompt 'The' --json                                 one line of JSON for each sample

Beyond the positions of the model, the latest half of them is what it sees of the text so far.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HELP = "go on with a text, by a trained language model"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="run folder that coterie train --task language-modeling wrote")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="the text to go on with (by default a document, or a line, begins)")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with that text")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="tokens to add at most (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy, 1 the model's own odds (0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most probable tokens only")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the most probable tokens that make up P")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="how many texts (1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first text; the next one takes the next number (0)")
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    parser.add_argument(
        "--weights", default="final", choices=("final", "best"), help="the last weights or the best ones"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each text")


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    check(args)
    prompt = args.prompt
    if args.prompt_file is not None:
        if not args.prompt_file.is_file():
            raise FileNotFoundError(f"--prompt-file: no file {args.prompt_file}")
        prompt = args.prompt_file.read_text("utf-8")
    from coterie.engine import load_run
    from coterie.engine.distributed import make_accelerator

    loaded = load_run(args.run, args.weights)
    task: Any = loaded.task
    if loaded.source.target != "text":
        raise ValueError(f"{args.run} is a run of {loaded.config.task.name}, not of language-modeling; "
                         "ask it by coterie predict")  # fmt: skip
    loaded.config.train.device = args.device
    model = loaded.model.to(make_accelerator(loaded.config.train).device)
    for number in range(args.num_samples):
        if number and not args.json:
            print("\n" + "-" * 40)
        streamer = None
        if args.stream:
            streamer = _streamer(task.tokenizer)
            print(prompt or "", end="", flush=True)
        text = task.generate(
            model, prompt, args.max_new_tokens, seed=args.seed + number, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, streamer=streamer,
        )  # fmt: skip
        if args.json:
            print(json.dumps({"prompt": prompt or "", "text": text, "seed": args.seed + number}))
        else:
            print("" if args.stream else text)
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse numbers out of their range before a model is loaded. Raises ValueError naming the option."""
    least = {"--max-new-tokens": (args.max_new_tokens, 1), "--num-samples": (args.num_samples, 1),
             "--seed": (args.seed, 0), "--temperature": (args.temperature, 0), "--top-k": (args.top_k, 1)}  # fmt: skip
    for name, (value, smallest) in least.items():
        if value is not None and not value >= smallest:
            raise ValueError(f"{name}: got {value}, takes {smallest} or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p: got {args.top_p}, takes a share above 0 and up to 1")
    if args.stream and args.json:
        raise ValueError("--stream and --json: takes one of them")


def _streamer(tokenizer: Any) -> Any:
    """Prints what has become whole characters; transformers gives it the prompt first, of every part."""
    from transformers.generation.streamers import BaseStreamer

    class Printer(BaseStreamer):
        """Decodes all tokens so far each time, and prints the characters that are new."""

        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.printed = 0
            self.prompt_next = True

        def put(self, value: Any) -> None:
            if self.prompt_next:
                self.prompt_next = False
                return
            self.tokens += value.tolist()
            text = tokenizer.decode(self.tokens)
            # The last bytes may be half a character, at most three of its four, which decode to replacement characters.
            whole = len(text[:-3]) + len(text[-3:].rstrip("\ufffd"))
            print(text[self.printed : whole], end="", flush=True)
            self.printed = max(self.printed, whole)

        def end(self) -> None:
            self.prompt_next = True

    return Printer()
