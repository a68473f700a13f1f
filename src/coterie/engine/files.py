"""Writing files so that a crash, a kill or a full disk never leaves half of one behind.

A file or folder is written under a temporary name beside its destination, flushed to the disk, and renamed: on POSIX
file systems the rename is atomic, so a reader sees the old state or the new one and nothing in between. Temporary names
start with `.tmp-`, so that leftovers of a killed process are recognised (`remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


class StorageError(OSError):
    """The disk did not take what had to be written; the message names the place, the cause and what to do."""


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (text as UTF-8) to `path`, replacing what is there; creates missing parent folders.

    Raises:
        StorageError: the place cannot be written or the disk is full; an earlier file at `path` is untouched.
    """
    path = Path(path)
    temporary = _temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends without an error it becomes `path`, whole and on the disk.

    An error inside the block removes the temporary folder and passes on; `path` never appears half-written.

    Raises:
        FileExistsError: `path` exists already.
        StorageError: the place cannot be written or the disk is full.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; it is not overwritten")
    temporary = _temporary_beside(path)
    try:
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _sync_file(Path(folder, name))
                _sync_folder(Path(folder))
            os.rename(temporary, path)
            _sync_folder(path.parent)
        except StorageError:
            raise
        except OSError as error:
            raise _storage_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Delete a folder so that it is never seen half-deleted: it gets a temporary name first."""
    path = Path(path)
    doomed = _temporary_beside(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Delete what killed processes left behind in `folder` under temporary names."""
    for leftover in Path(folder).glob(f"{TEMPORARY_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable. File systems that cannot sync a folder (some network ones) refuse: no data is lost."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _storage_error(path: Path, error: OSError) -> StorageError:
    cause = error.strerror or str(error)
    return StorageError(f"cannot write {path}: {cause}; free space or choose another folder (earlier files are intact)")
