"""From what a person types to a DataSource."""

from __future__ import annotations

import os
import re
from pathlib import Path

from coterie.data.images import printable
from coterie.data.source import TARGETS, DataSource

_KINDS = {
    "class": {
        "digits": set(),
        "folder": set(),
        "parquet": {"image", "label"},
        "hf": {"image", "label", "config"},
        "webdataset": set(),
    },
    "label_map": {
        "digit-scenes": set(),
        "maps": {"ignore"},
        "voc": set(),
        "parquet": {"image", "label", "ignore"},
    },
    "instances": {
        "digit-scenes": set(),
        "coco": set(),
        "voc": set(),
        "parquet": {"image", "label"},
    },
}  # type: dict[str, dict[str, set[str]]]
"""What can be opened for each target, and the options of each."""

_PLACES = {"digits": "digits", "digit-scenes": "digit-scenes", "hf": "hf:NAME", "webdataset": "webdataset:PATTERN"}


def _takes(target: str) -> str:
    specs = [_PLACES.get(kind, f"{kind}:PATH") for kind in _KINDS[target]]
    return ", ".join(specs) + ", or the path of a folder"


TAKES = _takes("class")


def open_data(
    spec: str | os.PathLike[str],
    *,
    target: str = "class",
    image_size: int | tuple[int, int] | None = None,
    max_bad_share: float = 0.01,
) -> DataSource:
    """Open a set of annotated pictures.

    Args:
        spec: with classes: "digits", "folder:PATH", "parquet:PATH", "hf:NAME" or "webdataset:PATTERN"; with label maps:
            "digit-scenes", "maps:PATH", "voc:PATH" or "parquet:PATH"; with instances: "digit-scenes", "coco:PATH",
            "voc:PATH" or "parquet:PATH". The kind of a bare path is guessed from what lies there. Options follow a
            question mark: "hf:cifar100?label=fine_label", "maps:PATH?ignore=void".
        target: what the pictures are to be annotated with, one of TARGETS.
        image_size: (height, width) or the side of a square at which digits (32 unless told) and digit-scenes (128) are
            drawn. Other sources have the size they have; `coterie.data.transforms` brings them to that of training.
        max_bad_share: share of the boxes and masks of a split that may be unusable (see `coterie.data.dense`).

    Returns:
        a checked DataSource with at least the splits "train" and "test".

    Raises:
        TypeError: `spec` is no text.
        FileNotFoundError: the file or folder does not exist.
        ValueError: an unknown kind of source, or one that could not be trained on; see `coterie.data.source.assemble`
            and `coterie.data.dense.assemble_dense`.
    """
    if not isinstance(spec, str | os.PathLike):
        raise TypeError(f"spec: got {type(spec).__name__}, takes text: {TAKES}")
    if target not in TARGETS:
        raise ValueError(f"target: got {target!r}, takes {', '.join(TARGETS)}")
    kind, place, options = parse_spec(os.fspath(spec), target)
    if target != "class":
        return _open_dense(kind, place, options, target, check_size(image_size), max_bad_share)
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


def _open_dense(
    kind: str,
    place: str,
    options: dict[str, str],
    target: str,
    image_size: tuple[int, int] | None,
    max_bad_share: float,
) -> DataSource:
    if kind == "digit-scenes":
        from coterie.data.digit_scenes import open_digit_scenes

        return open_digit_scenes(target, image_size)
    if kind == "coco":
        from coterie.data.coco import open_coco

        return open_coco(place, max_bad_share=max_bad_share)
    if kind == "voc":
        from coterie.data.voc import open_voc

        return open_voc(place, target, max_bad_share=max_bad_share)
    if kind == "maps":
        from coterie.data.maps import open_maps

        return open_maps(place, **options, max_bad_share=max_bad_share)
    from coterie.data.dense_parquet import open_instance_parquet, open_map_parquet

    if target == "label_map":
        return open_map_parquet(place, **options)
    return open_instance_parquet(place, **options, max_bad_share=max_bad_share)


def parse_spec(spec: str, target: str = "class") -> tuple[str, str, dict[str, str]]:
    """Split a spec into kind, place and options, guessing the kind of a bare path. Raises as `open_data`."""
    kinds, takes = _KINDS[target], _takes(target)
    if spec in ("digits", "digit-scenes") and spec in kinds:
        return spec, "", {}
    kind, colon, place = spec.partition(":")
    if not colon or kind not in kinds or kind in ("digits", "digit-scenes"):
        path = Path(spec).expanduser()
        if spec and path.is_dir():
            return _guess(path, target), spec, {}
        if path.suffix == ".parquet" and path.is_file():
            return "parquet", spec, {}
        if path.suffix == ".json" and path.is_file() and target == "instances":
            return "coco", spec, {}
        others = [other for other in TARGETS if other != target and (spec if not colon else kind) in _KINDS[other]]
        if others:
            raise ValueError(
                f"data source {printable(spec)!r}: has no {_NAMES[target]}, only {_NAMES[others[0]]}; takes {takes}"
            )
        raise ValueError(f"data source {printable(spec)!r}: no such source and no such folder; takes {takes}")
    if not place:
        raise ValueError(f"data source {spec!r}: nothing after the colon; takes {takes}")
    match = re.fullmatch(r"(.+?)\?(\w+=[^&=?]+(?:&\w+=[^&=?]+)*)", place)
    if not kinds[kind] or match is None:
        return kind, place, {}
    options = dict(pair.split("=") for pair in match[2].split("&"))
    unknown = sorted(set(options) - kinds[kind])
    if unknown:
        raise ValueError(f"data source {spec!r}: unknown option {unknown[0]!r}; takes {', '.join(sorted(kinds[kind]))}")
    return kind, match[1], options


_NAMES = {"class": "classes of whole pictures", "label_map": "label maps", "instances": "boxes"}


def check_size(image_size: int | tuple[int, int] | list[int] | None) -> tuple[int, int] | None:
    """An image size as (height, width), or None. Raises ValueError for anything but positive whole numbers."""
    if image_size is None:
        return None
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size: got {image_size!r}, takes a positive whole number or a pair (height, width)")
    return size[0], size[1]


def _guess(path: Path, target: str) -> str:
    # Not deeper: an image folder may hold a million files.
    if any(next(path.glob(pattern), None) is not None for pattern in ("*.parquet", "data/*.parquet")):
        return "parquet"
    if target == "class":
        return "webdataset" if next(path.glob("*.tar"), None) is not None else "folder"
    voc = "SegmentationClass" if target == "label_map" else "Annotations"
    is_voc = any((path / place / voc).is_dir() for place in (".", "VOC2007", "VOC2012"))
    if target == "label_map":
        return "voc" if is_voc else "maps"
    xml = any(next(path.glob(pattern), None) is not None for pattern in ("*.xml", "train/*.xml"))
    return "voc" if is_voc or xml else "coco"
