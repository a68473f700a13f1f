"""Checkpoints: one folder per checkpoint, tensors as safetensors, numbers as JSON, nothing pickled.

    checkpoints/step-00000120/
        model.safetensors        the trained weights and buffers
        average.safetensors      their moving average, where the run keeps one
        optimizer.safetensors    the optimizer's tensors as `<parameter>|<key>`
        state.json               step, best result so far, loss scale, losses not yet logged, size of each file

A folder takes its final name when everything in it is on the disk (see `files`), so a folder of that name is whole
whenever the process was killed; `latest` still checks sizes, because copies between machines break too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coterie.engine.files import StorageError, atomic_folder, remove_folder

FORMAT = 1


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`: one safetensors file per entry of `tensors`, and `state`. Returns its folder.

    Raises:
        StorageError: the disk did not take it; earlier checkpoints are intact.
    """
    path = folder / f"step-{step:08d}"
    if path.exists():
        if read_state(path) is not None:
            return path  # a run comes to the same step with the same state
        remove_folder(path)
    with atomic_folder(path) as temporary:
        for name, entries in tensors.items():
            save_tensors(temporary / f"{name}.safetensors", entries)
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, "files": sizes, **state}))
    return path


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors. Raises StorageError when the disk does not take them."""
    from safetensors import SafetensorError

    try:
        save_file(storable(tensors), path)
    except SafetensorError as error:  # this is how a full disk arrives here
        raise StorageError(f"cannot write {path}: {error}; free space or choose another folder") from error


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with a storage of its own, as safetensors takes them."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, earliest first; half-written and damaged ones are left out."""
    return [path for path in sorted(folder.glob("step-*")) if read_state(path) is not None]


def latest(folder: Path) -> Path | None:
    """The last whole checkpoint, or None."""
    whole = list_checkpoints(folder)
    return whole[-1] if whole else None


def read_state(path: Path) -> dict[str, Any] | None:
    """The numbers of a checkpoint, or None when the checkpoint is not whole."""
    try:
        state = json.loads((path / "state.json").read_text())
        whole = all((path / name).stat().st_size == size for name, size in state["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if state.get("format") != FORMAT:
        raise ValueError(f"{path} has checkpoint format {state.get('format')}; this version reads format {FORMAT}")
    return state if whole else None


def read_tensors(path: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors stored under `name` in the checkpoint, on the CPU, or None if it holds none of that name."""
    file = path / f"{name}.safetensors"
    return load_file(file) if file.exists() else None


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the last `keep` checkpoints and that of `best_step`."""
    for path in list_checkpoints(folder)[:-keep]:
        if path.name != f"step-{best_step or -1:08d}":
            remove_folder(path)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under the names of the parameters: `<parameter>|<key>`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": torch.as_tensor(value)
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: the tensors belong to another model.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        parameter_name, key = name.rsplit("|", 1)
        if parameter_name not in parameters:
            raise ValueError(f"the checkpoint has optimizer state of {parameter_name}, which the model does not have")
        parameter = parameters[parameter_name]
        # The step count of a fused optimizer lives beside its parameter.
        optimizer.state[parameter][key] = value.to(parameter.device)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Load a whole state dict into `model`.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names the first ones.
    """
    try:
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # another shape
        raise ValueError(f"{origin} does not fit the model: {' '.join(str(error).split())[:300]}") from error
    if missing or unknown:
        differences = [f"it lacks {missing[0]} and {len(missing) - 1} more"] if missing else []
        differences += [f"it has {unknown[0]} and {len(unknown) - 1} more that the model lacks"] if unknown else []
        raise ValueError(f"{origin} does not fit the model: {'; '.join(differences)}")
