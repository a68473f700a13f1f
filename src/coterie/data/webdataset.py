"""WebDataset shards on local disks: tar files whose consecutive members with one key are one sample.

    0001.jpg 0001.cls 0002.png 0002.cls ...

The key of a member is its path up to the first dot of its file name; what follows is the kind. A sample has a picture
and a label: `cls` (a class number or name) or `json` with an entry "label". Numbers get their names from a file
`classes.txt` beside the shards, one name a line, where there is one. Format: github.com/webdataset/webdataset.

The shards are indexed once at opening (member positions and labels), then read at random like any other source, so
that the order of training does not depend on the shards. Compressed or remote shards cannot be read so, and are
refused.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coterie.data.images import EXTENSIONS, BadSample, printable
from coterie.data.source import DataSource, ImageDataset, assemble, split_of

_LABEL_KINDS = ("cls", "json")


class Entry(NamedTuple):
    """Where a sample lies: shard number, key, position and size of its picture in the shard (size -1: no picture)."""

    shard: int
    key: str
    offset: int
    size: int
    label: str


class Shards(ImageDataset):
    """Pictures inside tar files, by their positions."""

    def __init__(self, shards: Sequence[str], entries: Sequence[Entry], labels: np.ndarray) -> None:
        self.shards = list(shards)
        self.labels = labels
        self.keys = [entry.key for entry in entries]
        self.shard_of = np.array([entry.shard for entry in entries], dtype=np.int64)
        self.offsets = np.array([entry.offset for entry in entries], dtype=np.int64)
        self.sizes = np.array([entry.size for entry in entries], dtype=np.int64)

    def read(self, index: int) -> bytes:
        size = int(self.sizes[index])
        if size < 0:
            raise BadSample(self.name(index), "the sample has no picture")
        # Opened anew for each picture: no handle to share between processes, and the cost is that of a small file.
        with open(self.shards[self.shard_of[index]], "rb") as file:
            file.seek(int(self.offsets[index]))
            return file.read(size)

    def name(self, index: int) -> str:
        return f"{printable(self.shards[self.shard_of[index]])}:{self.keys[index]}"


def open_webdataset(pattern: str) -> DataSource:
    """Open shards by a folder, a file, a glob or a brace pattern ("shards/{train,test}-{000..009}.tar").

    Raises:
        FileNotFoundError: no shard, or one of a brace pattern is missing.
        ValueError: a shard is remote, compressed, damaged, or holds a sample without a label.
    """
    shards = find_shards(pattern)
    by_split: dict[str, list[str]] = {}
    for shard in shards:
        words = [*re.split(r"[-_. \d]+", os.path.basename(shard)), os.path.basename(os.path.dirname(shard))]
        by_split.setdefault(next((split for word in words if (split := split_of(word))), "train"), []).append(shard)
    indexed = {split: _index(members) for split, members in by_split.items()}
    if "train" not in indexed:
        raise ValueError(f"webdataset:{pattern}: no training shards among the {len(shards)} found")
    classes = _classes(Path(shards[0]).parent / "classes.txt", indexed["train"])
    numbers = {name: number for number, name in enumerate(classes)}
    datasets: dict[str, ImageDataset] = {}
    for split, entries in indexed.items():
        labels = []
        for entry in entries:
            number = int(entry.label) if _is_number(entry.label) else numbers.get(entry.label)
            if number is None:
                where = f"{printable(by_split[split][entry.shard])}:{entry.key}"
                raise ValueError(f"{where}: unknown label {entry.label!r}; the classes are {', '.join(classes[:20])}")
            labels.append(number)
        datasets[split] = Shards(by_split[split], entries, np.array(labels, dtype=np.int64))
    return assemble(Path(shards[0]).resolve().parent.name, classes, datasets)


def find_shards(pattern: str) -> list[str]:
    """Paths of the shards that a pattern means, sorted. Raises as `open_webdataset`."""
    from braceexpand import braceexpand

    shown = f"webdataset:{pattern}"
    if re.match(r"^(\w+://|pipe:)", pattern):
        raise ValueError(f"{shown}: remote shards are not read; copy them to a local folder")
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        found = glob.glob(os.path.join(glob.escape(pattern), "*.tar"))
    else:
        found = []
        for name in braceexpand(pattern):
            matches = [name] if os.path.exists(name) else glob.glob(name)
            if not matches:
                raise FileNotFoundError(f"{shown}: no shard {name}")
            found += matches
    if not found:
        raise FileNotFoundError(f"{shown}: no .tar file")
    return sorted(set(found))


def _index(shards: Sequence[str]) -> list[Entry]:
    return [entry for number, shard in enumerate(shards) for entry in _index_shard(number, shard)]


def _index_shard(number: int, shard: str) -> Iterator[Entry]:
    key, picture, label = None, (0, -1), None
    shown = printable(shard)
    try:
        with tarfile.open(shard, "r:") as tar:
            length = os.path.getsize(shard)
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, dot, kind = name.partition(".")
                kind = kind.lower()
                is_picture = f".{kind}" in EXTENSIONS
                if not stem or not dot or not (is_picture or kind in _LABEL_KINDS):
                    continue  # hidden files, as some archivers add, and what else a sample may hold
                if (folder, stem) != key:
                    if key is not None:
                        yield _entry(number, shown, key, picture, label)
                    key, picture, label = (folder, stem), (0, -1), None
                if is_picture:
                    picture = member.offset_data, member.size
                else:
                    content = tar.extractfile(member)
                    label = _label(kind, content.read() if content else b"", f"{shown}:{member.name}", label)
            # tarfile takes anything but a header for the end; the real one is a block of zeros.
            with open(shard, "rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no header and no end at byte {tar.offset} of {length}")
    except tarfile.ReadError as error:
        raise ValueError(f"{shown}: damaged, cut off, or not an uncompressed tar file ({error})") from error
    if key is not None:
        yield _entry(number, shown, key, picture, label)


def _label(kind: str, data: bytes, where: str, known: str | None) -> str | None:
    try:
        if kind == "cls":
            return data.decode().strip()
        label = json.loads(data).get("label", known)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where}: not a label: {error}") from error
    return None if label is None else str(label)


def _entry(number: int, shard: str, key: tuple[str, str], picture: tuple[int, int], label: str | None) -> Entry:
    name = "/".join(filter(None, key))
    if label is None:
        raise ValueError(f"{shard}:{name}: no label; takes a member .cls, or .json with an entry 'label'")
    return Entry(number, name, *picture, label)


def _classes(names_file: Path, train: Sequence[Entry]) -> list[str]:
    if names_file.is_file():
        return [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    labels = {entry.label for entry in train}
    if all(_is_number(label) for label in labels):
        highest = max((int(label) for label in labels), default=-1)
        if highest >= len(train):
            raise ValueError(f"labels run to {highest} in {len(train)} samples; takes class numbers from 0")
        return [str(label) for label in range(highest + 1)]
    return sorted(labels)


def _is_number(label: str) -> bool:
    return bool(re.fullmatch(r"-?\d+", label))
