"""A network with what is needed to show it pictures: a trained run, or a bare model name with random weights.

Pictures are shown whole, in their own proportions: the short side is brought to the size of training, both sides to
multiples of the network's largest stride, so that the cells of every token grid lie exactly on the picture. (Training
and `coterie predict` see a square cut from the middle.) A network that takes one size only gets that square.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor, nn

from coterie.engine.answers import fit, keep_certain
from coterie.inspect.groups import StageGroups, attention_modules, look
from coterie.inspect.runs import check_run
from coterie.inspect.tiles import to_picture

if TYPE_CHECKING:
    from coterie.engine import Predictor

LARGEST_RATIO = 8  # of long to short side: beyond it a picture is a strip, and costs far more tokens than it shows
LARGEST_SIDE = 4096
TRIAL_SIDE = 128


@dataclass
class View:
    """What the network makes of one picture."""

    picture: np.ndarray  # (height, width, 3) uint8: exactly what the network saw
    found: list[StageGroups]
    probabilities: Float[np.ndarray, " classes"]
    answer: Image.Image | None = None  # of a dense run: the picture with the answer drawn on it


@dataclass
class Network:
    """A model in eval mode and how it takes pictures: `size` (height, width), `channels`, and their normalisation.

    Of a dense run `model` is the backbone, and `predictor` the whole.
    """

    model: nn.Module
    name: str
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: list[str]
    trained: bool
    predictor: Predictor | None = None

    @property
    def parameters(self) -> int:
        """How many parameters the whole network has."""
        whole = self.model if self.predictor is None else self.predictor.run.model
        return sum(parameter.numel() for parameter in whole.parameters())

    @property
    def has_groups(self) -> bool:
        """Whether there are dynamic groups to show."""
        return bool(attention_modules(self.model)[0])

    def prepare(self, image: Image.Image) -> Float[Tensor, "channels height width"]:
        """The picture as the network takes it. Raises ValueError for one that is a strip or has no pixels."""
        from coterie.data.images import to_mode

        if min(image.size) < 1 or max(image.size) > LARGEST_RATIO * min(image.size):
            raise ValueError(
                f"a picture of {image.width}x{image.height} pixels cannot be shown; takes sides up to 1:{LARGEST_RATIO}"
            )
        image = to_mode(image, self.channels)
        height, width = self.size
        if not _takes_one_size(self.model):
            height, width = _whole(image, self.size, _stride(self.model))
        if (image.width, image.height) != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        mean, std = (np.asarray(v, dtype=np.float32).reshape(-1, 1, 1) for v in (self.mean, self.std))
        return torch.from_numpy((pixels - mean) / std)

    def look(self, image: Image.Image) -> View:
        """Show the network a picture."""
        tensor = self.prepare(image)
        parameter = next(self.model.parameters(), tensor)
        found, output = look(self.model, tensor.to(parameter.device, parameter.dtype))
        picture = to_picture(tensor, self.mean, self.std)
        if self.predictor is not None:
            return View(picture, found, np.zeros(0), self._draw(Image.fromarray(picture)))
        chances = output.float().softmax(-1)[0].cpu().numpy() if output.ndim == 2 and output.shape[1] else np.zeros(0)
        return View(picture, found, chances)

    def _draw(self, image: Image.Image) -> Image.Image:
        """The picture with what the network says about it, instances from a score of one half on."""
        assert self.predictor is not None
        task: Any = self.predictor.run.task
        answer = keep_certain(self.predictor.answer([image])[0], 0.5)
        return task.draw(*fit(image, answer, most=640))


def open_run(run_dir: str | Path) -> Network:
    """The network of a training run with its best-known weights.

    Raises:
        FileNotFoundError: no such folder, or a run without weights yet.
        ValueError: not a run folder, or weights that do not fit.
    """
    from coterie.engine import Predictor, load_run

    run = load_run(check_run(run_dir))
    how = run.source.transform
    if how.image_size is None or how.mean is None or how.std is None:
        raise ValueError(f"run: {run_dir} does not say how its pictures were prepared (source.json is incomplete)")
    size = (how.image_size, how.image_size) if isinstance(how.image_size, int) else how.image_size
    predictor = None
    if run.source.target != "class":
        predictor = Predictor(run, "cpu")
        size = (how.min_size, how.min_size) if how.min_size else size
    name = run.config.model.name or type(run.model).__name__
    channels, classes = run.source.channels, list(run.source.classes)
    model = run.model.eval() if predictor is None else run.model.eval().get_submodule("backbone")
    return Network(model, name, size, channels, how.mean, how.std, classes, True, predictor)


def open_model(name: str, size: int | None = None) -> Network:
    """A model by name with random weights (always the same ones), to try inspection before anything is trained.

    Raises:
        ValueError: no such model.
    """
    import coterie

    if not isinstance(name, str) or not name:
        raise ValueError(f"model: got {name!r}, takes a name that `coterie list models` prints")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = coterie.create_model(name, pretrained=False)
        except RuntimeError as error:  # timm's word for an unknown name
            raise ValueError(f"model: {error}; takes a name that `coterie list models` prints") from error
    known = getattr(model, "pretrained_cfg", {}) or {}
    channels, height, width = known.get("input_size") or (3, 224, 224)
    if not _takes_one_size(model):
        # Nothing was trained at any size; a network for small images still has more to show on a larger one.
        height = width = size or max(height, TRIAL_SIDE)
    mean, std = (tuple(known.get(key) or (0.5,) * channels) for key in ("mean", "std"))
    return Network(model.eval(), name, (height, width), channels, mean, std, [], False)


def open_image(path: str | Path) -> Image.Image:
    """Read a picture file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, or damaged, or no picture.
    """
    from coterie.data.images import BadSample, decode_image

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"image: {path} does not exist")
    if path.is_dir():
        raise ValueError(f"image: {path} is a folder; takes picture files, such as {path}/*.png")
    try:
        return decode_image(path.read_bytes(), 3, str(path))
    except BadSample as error:
        raise ValueError(f"image: {error}") from error


def _takes_one_size(model: nn.Module) -> bool:
    """Whether the network has a fixed input size, as timm's Vision Transformers have unless told otherwise."""
    embedding = getattr(model, "patch_embed", None)
    return bool(getattr(embedding, "strict_img_size", False)) and not getattr(model, "dynamic_img_size", False)


def _stride(model: nn.Module) -> int:
    """The network's largest stride: its own word (timm's feature_info, a backbone's strides), else 32."""
    if strides := getattr(model, "strides", None):
        return int(max(strides))
    info = getattr(model, "feature_info", None)
    entries = info if isinstance(info, list) else getattr(info, "info", [])
    return max((int(entry.get("reduction", 0)) for entry in entries), default=0) or 32


def _whole(image: Image.Image, size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Height and width for the whole picture: short side near that of `size`, both multiples of `stride`."""
    scale = min(size) / min(image.size)
    height, width = (max(round(side * scale / stride), 1) * stride for side in (image.height, image.width))
    return min(height, LARGEST_SIDE), min(width, LARGEST_SIDE)
