"""Authors' checkpoints, loaded into the models here: every tensor used, or dropped for a reason that is named.

A model that has them says in its method `from_authors` what its authors call its parameters. This module reads the
file, without running anything that is in it, and is strict: a key that nobody asked for, a parameter that stays empty,
or a shape that differs is one error that names both sides, and nothing is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_WRAPPERS = ("model", "state_dict", "state_dict_ema", "model_ema", "module")  # where training scripts put the weights


@dataclass
class LoadedCheckpoint:
    """What `load_authors_checkpoint` did: how many tensors it used, and what it dropped, with why."""

    path: Path
    used: int = 0
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.used} tensors used, {len(self.dropped)} dropped"]
        return "\n".join([*lines, *(f"  dropped  {name}: {why}" for name, why in self.dropped.items())])


def load_authors_checkpoint(model: nn.Module, path: str | PathLike[str]) -> LoadedCheckpoint:
    """Load a checkpoint that the authors of a model have published.

    Args:
        model: one of this library's models that has a `from_authors`, of the checkpoint's variant and classes.
        path: a file of safetensors, or one that torch.save wrote (read with `weights_only=True`).

    Returns:
        What was used and what was dropped; print it.

    Raises:
        ValueError: no readable checkpoint, or one of another model: names that do not fit or shapes that differ.
        TypeError: a model without `from_authors`.
        FileNotFoundError: no such file.
    """
    convert = getattr(model, "from_authors", None)
    if convert is None:
        raise TypeError(f"{type(model).__name__} has no from_authors: it knows of no authors' checkpoints")
    path = Path(path)
    state = read_weights(path)
    tensors, dropped = convert(state)
    _check(type(model).__name__, path, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return LoadedCheckpoint(path, len(state) - len(dropped), dropped)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, taken out of what training scripts wrap around them.

    Raises:
        ValueError: the file holds something else, or more than weights. FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        short = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a checkpoint that can be read without running its code ({short})") from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{path}: damaged or not safetensors ({error})") from None
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path}: holds no tensors by name, nor under any of {', '.join(_WRAPPERS)}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _check(kind: str, path: Path, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Both sides have the same names and shapes."""
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        parts = [f"{len(names)} {what} ({_some(names)})" for names, what in
                 ((missing, "parameters stay empty"), (unknown, "tensors have no place")) if names]  # fmt: skip
        raise ValueError(f"{path}: not a checkpoint of this {kind}: {' and '.join(parts)}; is it another variant's?")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{path}: not a checkpoint of this {kind}: {name} has shape {tuple(tensor.shape)} in the file and "
                f"{tuple(wanted[name].shape)} in the model; is it another variant's, or of other classes?"
            )


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
