"""Files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from coterie.engine.files import StorageError, atomic_folder, atomic_write, remove_folder, remove_leftovers


def test_write_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    atomic_write(tmp_path / "deep" / "file", "one")
    atomic_write(tmp_path / "deep" / "file", b"two")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file"]
    assert (tmp_path / "deep" / "file").read_bytes() == b"two"


def test_failed_write_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = atomic_write(tmp_path / "file", "earlier")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"file: No space left on device; free space"):
        atomic_write(path, "later")
    assert path.read_text() == "earlier"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_write_below_a_file_is_refused_clearly(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "text")
    with pytest.raises(StorageError, match="cannot write"):
        atomic_write(tmp_path / "file" / "below", "text")


def test_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "step") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "step").exists()
    assert (tmp_path / "step" / "a").read_text() == "a"
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(tmp_path / "step"):
        pass


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def write_and_break() -> None:
        with atomic_folder(tmp_path / "step") as folder:
            (folder / "a").write_text("a")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_and_break()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_and_removal(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-1").mkdir()
    (tmp_path / ".tmp-file-1").write_text("half")
    with atomic_folder(tmp_path / "step") as folder:
        (folder / "a").write_text("a")
    remove_leftovers(tmp_path)
    assert [item.name for item in tmp_path.iterdir()] == ["step"]
    remove_folder(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []
