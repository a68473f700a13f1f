"""From what a person types to a DataSource."""

from __future__ import annotations

import os
import re
from pathlib import Path

from coterie.data.images import printable
from coterie.data.source import DataSource

TAKES = "digits, folder:PATH, parquet:PATH, hf:NAME, webdataset:PATTERN, or the path of a folder"

_OPTIONS = {"parquet": {"image", "label"}, "hf": {"image", "label", "config"}}


def open_data(spec: str | os.PathLike[str], *, image_size: int | tuple[int, int] | None = None) -> DataSource:
    """Open a set of labelled pictures.

    Args:
        spec: "digits", "folder:PATH", "parquet:PATH", "hf:NAME" or "webdataset:PATTERN"; a bare path of a folder is
            parquet when there is a .parquet file in it, shards when there is a .tar file, else an image folder. Where
            a set has several label or image columns, "?label=COLUMN&image=COLUMN" after parquet:PATH or hf:NAME
            chooses ("hf:cifar100?label=fine_label").
        image_size: (height, width) or the side of a square at which digits are drawn (32 unless told). Other sources
            have the size they have; `coterie.data.transforms` brings them to the size of training.

    Returns:
        a checked DataSource with at least the splits "train" and "test".

    Raises:
        TypeError: `spec` is no text.
        FileNotFoundError: the file or folder does not exist.
        ValueError: an unknown kind of source, or one that could not be trained on; see `coterie.data.source.assemble`.
    """
    if not isinstance(spec, str | os.PathLike):
        raise TypeError(f"spec: got {type(spec).__name__}, takes text: {TAKES}")
    kind, place, options = parse_spec(os.fspath(spec))
    if kind == "digits":
        from coterie.data.digits import open_digits

        return open_digits(check_size(image_size))
    if kind == "folder":
        from coterie.data.folder import open_folder

        return open_folder(place)
    if kind == "parquet":
        from coterie.data.parquet import open_parquet

        return open_parquet(place, **options)
    if kind == "hf":
        from coterie.data.hub import open_hub

        return open_hub(place, **options)
    from coterie.data.webdataset import open_webdataset

    return open_webdataset(place)


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """Split a spec into kind, place and options, guessing the kind of a bare path. Raises as `open_data`."""
    if spec == "digits":
        return "digits", "", {}
    kind, colon, place = spec.partition(":")
    if not colon or kind not in ("folder", "parquet", "hf", "webdataset"):
        path = Path(spec).expanduser()
        if spec and path.is_dir():
            return _guess(path), spec, {}
        if path.suffix == ".parquet" and path.is_file():
            return "parquet", spec, {}
        raise ValueError(f"data source {printable(spec)!r}: no such source and no such folder; takes {TAKES}")
    if not place:
        raise ValueError(f"data source {spec!r}: nothing after the colon; takes {TAKES}")
    match = re.fullmatch(r"(.+?)\?(\w+=[^&=?]+(?:&\w+=[^&=?]+)*)", place)
    if kind not in _OPTIONS or match is None:
        return kind, place, {}
    options = dict(pair.split("=") for pair in match[2].split("&"))
    unknown = sorted(set(options) - _OPTIONS[kind])
    if unknown:
        raise ValueError(
            f"data source {spec!r}: unknown option {unknown[0]!r}; takes {', '.join(sorted(_OPTIONS[kind]))}"
        )
    return kind, match[1], options


def check_size(image_size: int | tuple[int, int] | list[int] | None) -> tuple[int, int] | None:
    """An image size as (height, width), or None. Raises ValueError for anything but positive whole numbers."""
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size: got {image_size!r}, takes a positive whole number or a pair (height, width)")
    return size[0], size[1]


def _guess(path: Path) -> str:
    # Not deeper: an image folder may hold a million files.
    if any(next(path.glob(pattern), None) is not None for pattern in ("*.parquet", "data/*.parquet")):
        return "parquet"
    if next(path.glob("*.tar"), None) is not None:
        return "webdataset"
    return "folder"
