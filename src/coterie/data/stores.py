"""Where the pictures of an annotation file lie: in a folder, or in an uncompressed tar file that is not unpacked."""

from __future__ import annotations

import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from coterie.data.images import printable


class Store(ABC):
    """Files by the names that an annotation file gives them."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file. Raises OSError."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def path(self, name: str) -> str:
        """What people call the file."""


class Folder(Store):
    """Files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes:
        return Path(self.folder, name).read_bytes()

    def has(self, name: str) -> bool:
        return Path(self.folder, name).is_file()

    def path(self, name: str) -> str:
        return printable(os.path.join(self.folder, name))


class Tar(Store):
    """Members of an uncompressed tar file below `prefix`, read by their positions.

    Raises:
        ValueError: no tar file, or a compressed one.
    """

    def __init__(self, file: Path, prefix: str = "") -> None:
        self.file = file
        self.prefix = prefix
        self.places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    if member.isfile():
                        name = os.path.normpath(member.name)
                        self.places[name] = member.offset_data, member.size
        except tarfile.ReadError as error:
            raise ValueError(f"{printable(file)}: damaged, or not an uncompressed tar file ({error})") from error

    def below(self, prefix: str) -> Tar:
        """The same file with another prefix, indexed once."""
        other = object.__new__(Tar)
        other.file, other.prefix, other.places = self.file, prefix, self.places
        return other

    def folders(self) -> list[str]:
        """Every folder that holds a member, as prefixes."""
        return sorted({str(parent) for name in self.places for parent in PurePosixPath(name).parents})

    def _member(self, name: str) -> str:
        return os.path.normpath(os.path.join(self.prefix, name))

    def read(self, name: str) -> bytes:
        place = self.places.get(self._member(name))
        if place is None:
            raise FileNotFoundError(2, "No such member")
        with open(self.file, "rb") as file:
            file.seek(place[0])
            return file.read(place[1])

    def has(self, name: str) -> bool:
        return self._member(name) in self.places

    def path(self, name: str) -> str:
        return f"{printable(self.file)}:{printable(self._member(name))}"


def find_store(names: Iterable[str], candidates: Iterable[Store]) -> Store | None:
    """The first of `candidates` that has the most of `names`; None when none has any."""
    names = list(names)
    best, most = None, 0
    for store in candidates:
        count = sum(store.has(name) for name in names)
        if count > most:
            best, most = store, count
    return best
