"""Pictures with label maps, and what the values in the files of a label map mean."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coterie.data.annotations import IGNORE
from coterie.data.dense import read_checked
from coterie.data.images import BadSample, decode_image, printable, read_header
from coterie.data.randomness import permutation
from coterie.data.source import ImageDataset
from coterie.data.stores import Store

IGNORED_NAMES = frozenset(
    {"unlabelled", "unlabeled", "void", "ignore", "ignored", "unknown", "don't care", "dontcare", "undefined"}
)
"""Classes of these names do not count."""

_SAMPLED = 64

Table = UInt8[np.ndarray, " 256"] | Mapping[tuple[int, int, int], int]
"""Class number of each value of a grey or palette picture, or of each (red, green, blue); IGNORE for none."""


class LabelMapImages(ImageDataset):
    """Pictures with a picture of their labels, file by file.

    Args:
        images, maps: where the files lie.
        files: for each sample the name of its picture and of its label map.
        class_count: number of classes.
        table: what the values in the files mean.
    """

    kind = "label_map"

    def __init__(
        self,
        images: Store,
        maps: Store,
        files: Sequence[tuple[str, str]],
        class_count: int,
        table: Table,
    ) -> None:
        self.images, self.maps, self.files = images, maps, list(files)
        self.class_count = class_count
        self.table = table
        self.labels = np.full(len(files), -1, dtype=np.int64)

    def read(self, index: int) -> bytes:
        return self.images.read(self.files[index][0])

    def read_map(self, index: int) -> bytes:
        """The bytes of the label map's file. Raises BadSample."""
        name = self.files[index][1]
        try:
            return self.maps.read(name)
        except OSError as error:
            raise BadSample(self.maps.path(name), error.strerror or str(error)) from error

    def name(self, index: int) -> str:
        return self.images.path(self.files[index][0])

    def map_name(self, index: int) -> str:
        """What people call the label map."""
        return self.maps.path(self.files[index][1])

    def image(self, index: int) -> Image.Image:
        header = read_header(self.read_map(index), self.map_name(index))
        size = header.height, header.width
        return decode_image(read_checked(self, index), self.channels, self.name(index), size)

    def target(self, index: int) -> UInt8[np.ndarray, "height width"]:
        name = self.map_name(index)
        return to_labels(read_values(self.read_map(index), name), self.table, self.class_count, name)


def read_values(data: bytes, name: str) -> np.ndarray:
    """The pixels of a label map as they are stored: (height, width) integers, or (height, width, 3) of colours.

    A palette picture gives its indices, not its colours. Raises BadSample.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode in ("RGBA", "CMYK", "YCbCr", "LAB"):
                return np.asarray(image.convert("RGB"))
            if image.mode == "1":
                return np.asarray(image.convert("L")) // 255
            values = np.asarray(image)
    except Exception as error:  # as in images.decode_image
        raise BadSample(name, f"not a label map: {' '.join(str(error).split())[:200]}") from error
    if values.dtype.kind not in "ui" or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise BadSample(name, f"a label map of {values.dtype} and shape {values.shape}, takes whole numbers or RGB")
    return values


def to_labels(
    values: np.ndarray,
    table: Table,
    class_count: int,
    name: str,
) -> UInt8[np.ndarray, "height width"]:
    """Stored values to class numbers (see LabelMapImages). Raises BadSample for a value that stands for no class."""
    if values.ndim == 3:
        if not isinstance(table, Mapping):
            raise BadSample(name, "the label map is in colours, and no file says which colour is which class")
        return _from_colours(values, table, name)
    if isinstance(table, Mapping):
        raise BadSample(name, "the label map is not in colours, as the set's table of colours says")
    if values.dtype != np.uint8:
        values = np.where(values == 0xFFFF, IGNORE, values)
        if values.max(initial=0) > 0xFF or values.min(initial=0) < 0:
            wrong = int(values[(values > 0xFF) | (values < 0)][0])
            raise BadSample(name, f"label value {wrong} is none of the {class_count} classes")
        values = values.astype(np.uint8)
    labels = table[values]
    wrong_labels = (labels >= class_count) & (labels != IGNORE)
    if wrong_labels.any():
        row, column = (int(place[0]) for place in np.nonzero(wrong_labels))
        raise BadSample(
            name,
            f"label value {int(values[row, column])} at row {row}, column {column} is none of the {class_count} "
            f"classes, takes 0 to {class_count - 1}, or {IGNORE} for pixels to ignore",
        )
    return labels


def _from_colours(values: np.ndarray, table: Mapping[tuple[int, int, int], int], name: str) -> np.ndarray:
    codes = values.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    known = np.array([red << 16 | green << 8 | blue for red, green, blue in table], dtype=np.int32)
    order = np.argsort(known)
    place = np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)
    found = order[place]
    if (known[found] != codes).any():
        row, column = (int(place[0]) for place in np.nonzero(known[found] != codes))
        colour = tuple(values[row, column].tolist())
        raise BadSample(name, f"colour {colour} at row {row}, column {column} stands for no class")
    return np.array(list(table.values()), dtype=np.uint8)[found]


def settle_values(
    where: str, stated: Sequence[str] | None, ignore: str | None, sample: set[int], first: int = 0
) -> tuple[list[str], Table]:
    """The classes of a set of grey or palette label maps, and what each stored value means.

    Args:
        where: the set, for people.
        stated: names of the classes, from the value `first` on; None where no file says.
        ignore: names or numbers of classes that do not count, separated by commas.
        sample: values seen in some of the maps. Where they are 0 and 255 only, and there are two classes or no names,
            the maps are black and white pictures, and 255 is the class 1.

    Raises:
        ValueError: `ignore` names no class, or the values do not tell the classes.
    """
    black_and_white = sample == {0, IGNORE} and (stated is None or len(stated) == 2)
    if stated is None:
        highest = max(sample - {IGNORE}, default=-1)
        if not 0 <= highest < IGNORE - 1:
            raise ValueError(f"{where}: label values run to {highest}; put a classes.json beside the files")
        names = [str(value) for value in range(highest + 1)]
        stated = ["background", "foreground"] if black_and_white else names
    classes, numbers = drop_ignored(stated, ignore, where)
    table = value_table(np.concatenate([np.full(first, IGNORE), numbers]))
    if black_and_white:
        table[IGNORE] = numbers[1]
    return classes, table


def sample_values(count: int, read: Callable[[int], bytes], name: Callable[[int], str]) -> set[int]:
    """The values in some of `count` label maps. Raises ValueError where all of them are in colours."""
    found: set[int] = set()
    in_colours = None
    for index in permutation(count, 0)[:_SAMPLED].tolist():
        try:
            values = read_values(read(index), name(index))
        except (BadSample, OSError):
            continue  # the Loader reports it when its turn comes
        if values.ndim == 3:
            in_colours = name(index)
        else:
            found.update(np.unique(values).tolist())
    if in_colours is not None and not found:
        raise ValueError(f"{in_colours}: a label map in colours; put a class_dict.csv (name,r,g,b) beside the folders")
    return found - {0xFFFF}


def value_table(numbers: np.ndarray) -> np.ndarray:
    """Class number by stored value; 255 is ignored, further values are errors."""
    table = np.full(256, IGNORE - 1, dtype=np.uint8)  # no set has a class of that number
    table[: len(numbers)] = numbers
    table[IGNORE] = IGNORE
    return table


def drop_ignored(names: Sequence[str], ignore: str | None, where: str) -> tuple[list[str], np.ndarray]:
    """The classes that count, and for each of `names` its number among them, or IGNORE.

    Raises:
        ValueError: `ignore` names no class.
    """
    asked = {part.strip() for part in (ignore or "").split(",") if part.strip()}
    known = {*names, *(str(value) for value in range(len(names)))}
    if asked - known:
        raise ValueError(
            f"{where}: ignore: no class {sorted(asked - known)[0]!r}; the classes are {', '.join(names[:20])}"
        )
    kept = [
        name
        for value, name in enumerate(names)
        if name not in asked and str(value) not in asked and name.lower() not in IGNORED_NAMES
    ]
    return kept, np.array([kept.index(name) if name in kept else IGNORE for name in names])


def class_names(folder: Path) -> list[str] | None:
    """Names in classes.json (a list) or classes.txt (one a line, also codes.txt), or None."""
    file = folder / "classes.json"
    if file.is_file():
        try:
            names = json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{printable(file)}: not a json file: {error}") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{printable(file)}: takes a list of names")
        return names
    for file in (folder / "classes.txt", folder / "codes.txt"):
        if file.is_file():
            return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return None
