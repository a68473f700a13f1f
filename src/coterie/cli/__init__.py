"""The `coterie` command. Each subcommand is one module of this package: `HELP`, `configure(parser)` and `run(args) ->
int`."""

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

from coterie._version import __version__

_ORDER = ("train", "eval", "predict", "generate", "export", "inspect", "bench", "list", "info")
_EXTRAS = {"segmentation_models_pytorch": "dense", "pycocotools": "dense", "sklearn": "data", "torchmetrics": "train",
           "transformers": "lm", "tokenizers": "lm"}  # fmt: skip
"""Packages that a command may lack, and the extra that brings them."""
_EXAMPLES = """\
examples:
  coterie train                                     train a Dynamic Group Transformer on real handwritten digits
  coterie train --data folder:photos                on your own pictures, one folder per class
  coterie train --task object-detection --data digit-scenes      find things: detectors, segmentation
  coterie train --task language-modeling            a language model, on documentation that is installed already
  coterie predict runs/digits photo.png             ask a trained run about a picture
  coterie inspect runs/digits photo.png             see which tokens group, and which keys each group chose
  coterie bench op dynamic_group --tokens 3136      speed and memory against exact attention
  coterie info                                      what runs on this machine, and why something would not
"""


def commands() -> list[str]:
    """Names of the subcommands, in the order of the help."""
    found = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return [n for n in _ORDER if n in found] + sorted(found.difference(_ORDER))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: the input was wrong)."""
    arguments = [*(sys.argv[1:] if argv is None else argv)]  # not list(): the subcommand of that name may hide it
    modules = {name: importlib.import_module(f"coterie.cli.{name}") for name in _wanted(arguments)}
    if arguments and arguments[0] in modules and getattr(modules[arguments[0]], "JSONARGPARSE", False):
        from jsonargparse import ArgumentParser

        name = arguments[0]
        typed = ArgumentParser(
            prog=f"coterie {name}",
            allow_abbrev=False,
            description=modules[name].__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        modules[name].configure(typed)
        given = _files_first(_long(arguments[1:], getattr(modules[name], "SHORT", {})))
        return _run(name, modules[name], typed.parse_args(given))

    parser = argparse.ArgumentParser(
        prog="coterie",
        description="Structured attention for PyTorch: train, look into, and measure.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"coterie {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for name, module in modules.items():
        sub = subparsers.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if not getattr(module, "JSONARGPARSE", False):
            module.configure(sub)
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 0
    return _run(args.command, modules[args.command], args)


def _wanted(arguments: list[str]) -> list[str]:
    """Only the module of the command that is called, or all of them for the help."""
    known = commands()
    return [arguments[0]] if arguments and arguments[0] in known else known


def _long(arguments: list[str], short: dict[str, str]) -> list[str]:
    """The arguments with short forms (`--task NAME`) written out (`--task.name NAME`).

    The same option with a mapping, `--task '{name: NAME}'`, stays: it sets a whole section.
    """
    out = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        following = value if equals else next(iter(arguments[place + 1 :]), "")
        if option in short and not following.lstrip().startswith("{"):
            out[place] = short[option] + equals + value
    return out


def _files_first(arguments: list[str]) -> list[str]:
    """The arguments with every `--config FILE` in front: what is said prevails, also when said before it."""
    files, others, rest = [], [], iter(arguments)
    for argument in rest:
        if argument == "--config":
            files += [argument, *(value for value in [next(rest, None)] if value is not None)]
        elif argument.startswith("--config="):
            files.append(argument)
        else:
            others.append(argument)
    return files + others


def _run(name: str, module: object, args: object) -> int:
    try:
        return int(module.run(args) or 0)  # type: ignore[attr-defined]
    except BrokenPipeError:  # `coterie list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"coterie {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("COTERIE_TRACEBACK"):
            raise
        missing = error.name.split(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
        hint = f"; pip install 'coterie[{_EXTRAS[missing]}]'" if missing in _EXTRAS else ""
        print(f"coterie {name}: error: {error}{hint}", file=sys.stderr)
        return 2
