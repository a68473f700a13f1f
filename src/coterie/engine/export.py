"""A trained run as an ONNX file, checked against the model it was made from.

The graph takes pictures as they come from a decoder, float32 from 0 to 1, and normalises them itself. Height and width
are fixed by the export, because tracing fixes the grids of groups and windows; the batch is free.

    whole      classification: logits (batch, classes)
               label maps: logits (batch, classes, height, width)
    backbone   the four maps of a dense run's backbone, the finest first

Detectors cannot be exported whole: how many boxes survive their thresholds and suppression depends on the picture, and
the tracer takes no such program. Their backbone can, and for the rest there is `coterie predict --json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from coterie.engine.files import atomic_write
from coterie.engine.runs import LoadedRun

PARTS = ("whole", "backbone")
TOLERANCE = 1e-3
"""Greatest difference to the model's output, as a share of its largest value. Float32 gives about 1e-6; more where two
groups or keys are nearly equal and the other one is chosen."""


class ExportError(ValueError):
    """What cannot be exported, and what to do instead."""


@dataclass
class Exported:
    """What `export` wrote.

    Attributes:
        path: The ONNX file.
        input: Shape of the input, `batch` where it is free.
        outputs: Name and shape of each output, likewise.
        difference: Greatest difference between onnxruntime's outputs and the model's, as a share of the largest value.
    """

    path: Path
    input: tuple[Any, ...]
    outputs: dict[str, tuple[Any, ...]]
    difference: float


class _Normalised(nn.Module):
    """Pixels from 0 to 1 to the outputs of `model`, as a tuple."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, ...]:
        outputs = self.model((image - self.mean) / self.std)
        return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)


def export(run: LoadedRun, path: str | Path, *, part: str = "whole", size: tuple[int, int] | None = None) -> Exported:
    """Write a run's model as ONNX and compare what onnxruntime makes of it with the model.

    Args:
        run: As `load_run` gives it.
        path: The file to write; replaced if it exists.
        part: `whole` or `backbone`.
        size: (height, width) of the pictures in pixels; that of training if not given.

    Raises:
        ExportError: a run that cannot be exported, or a file whose results differ from the model's.
        ValueError: an unknown part or a size that is none.
        ImportError: onnx, onnxscript or onnxruntime is missing.
    """
    _require()
    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, takes {' or '.join(PARTS)}")
    height, width = size or _training_size(run)
    if min(height, width) < 1:
        raise ValueError(f"size: got {height}x{width}, takes pixels of at least 1")
    network, names = _network(run, part)
    how = run.source.transform
    model = _Normalised(network, how.mean or (0.0,), how.std or (1.0,)).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, run.source.channels, height, width, generator=generator)
    file = _trace(model, images, names, _facts(run, part))
    outputs, difference = _compare(model, images[:1], names, file)
    path = atomic_write(path, file)
    shapes = {name: ("batch", *output.shape[1:]) for name, output in zip(names, outputs, strict=True)}
    return Exported(path, ("batch", *images.shape[1:]), shapes, difference)


def _require() -> None:
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export needs {', '.join(missing)}: pip install 'coterie[export]'")


def _training_size(run: LoadedRun) -> tuple[int, int]:
    size = run.source.transform.image_size
    if size is None:
        raise ExportError("the run does not say the size of its pictures; give one with --size HEIGHT WIDTH")
    return (size, size) if isinstance(size, int) else size


def _network(run: LoadedRun, part: str) -> tuple[nn.Module, list[str]]:
    """What is exported, and the names of its outputs."""
    backbone = getattr(run.model, "backbone", None)
    if part == "backbone":
        if not isinstance(backbone, nn.Module):
            raise ExportError(f"a run of {run.config.task.name} has no backbone apart; take --part whole")
        return backbone, [f"map{stride}" for stride in backbone.strides]  # type: ignore[union-attr]
    if run.source.target == "instances":
        raise ExportError(
            f"{run.config.task.name}: a detector cannot be exported whole, because the number of its boxes depends on "
            "the picture; export its backbone (--part backbone), or take its answers from coterie predict --json"
        )
    return run.model, ["logits"]


def _facts(run: LoadedRun, part: str) -> dict[str, str]:
    """What a program needs to use the file, kept in its metadata."""
    return {
        "task": run.config.task.name,
        "model": run.config.model.name or "",
        "part": part,
        "classes": json.dumps(run.source.classes),
        "input": "RGB pixels from 0 to 1; the graph normalises them"
        if run.source.channels == 3
        else "grey from 0 to 1",
    }


def _trace(model: nn.Module, images: Tensor, names: list[str], facts: dict[str, str]) -> bytes:
    import logging
    import warnings

    import onnx

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer's, about its own workings
            program = torch.onnx.export(
                model, (images,), dynamo=True, verbose=False, input_names=["image"], output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), external_data=False,
            )  # fmt: skip
    except RuntimeError as error:
        raise ExportError(f"torch.onnx cannot trace this model: {' '.join(str(error).split())[:300]}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    graph = program.model_proto
    for key, value in facts.items():
        graph.metadata_props.add(key=key, value=value)
    file = graph.SerializeToString()
    onnx.checker.check_model(file)
    return file


def _compare(model: nn.Module, images: Tensor, names: list[str], file: bytes) -> tuple[list[Tensor], float]:
    """The model's outputs and how far onnxruntime's are from them; a batch of another size than the traced one."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    got = session.run(names, {"image": images.numpy()})
    with torch.no_grad():
        expected = list(model(images))
    worst = 0.0
    for output, other in zip(expected, got, strict=True):
        if tuple(output.shape) != tuple(np.shape(other)):
            raise ExportError(f"the ONNX file gives shape {np.shape(other)}, the model {tuple(output.shape)}")
        worst = max(worst, float((output - torch.from_numpy(other)).abs().max() / output.abs().max().clamp(min=1e-6)))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"the ONNX file's outputs differ from the model's by {worst:.1e} of the largest value, more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    return expected, worst
