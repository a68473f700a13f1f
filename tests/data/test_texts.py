"""Reading text: files, folders, tables; splits; what is wrong with them."""

import gzip
import lzma
import os
from pathlib import Path

import pytest

from coterie.data.texts import cut, divide, open_texts, parse_spec, read_text

PROSE = "".join(f"Line {number}: the quick brown fox.\n" for number in range(200))
SHARED = Path(os.environ.get("COTERIE_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(PROSE)
    return path


def joined(documents: list[bytes]) -> bytes:
    return b"".join(documents)


def test_a_file_is_cut_in_its_order_and_nothing_is_lost(book: Path) -> None:
    splits = open_texts(f"text:{book}").splits
    assert list(splits) == ["train", "validation", "test"]
    assert b"".join(joined(documents) for documents in splits.values()) == PROSE.encode()
    assert [round(len(joined(documents)) / len(PROSE), 2) for documents in splits.values()] == [0.9, 0.05, 0.05]
    assert open_texts(str(book)).splits == splits  # a bare path


def test_shares_and_named_files_make_the_splits(book: Path, tmp_path: Path) -> None:
    splits = open_texts(f"text:{book}?validation=0&test=0.1").splits
    assert list(splits) == ["train", "test"]
    assert len(joined(splits["test"])) == round(0.1 * len(PROSE))
    (tmp_path / "held.txt").write_text("held out")
    splits = open_texts(f"text:{book}?validation={tmp_path / 'held.txt'}&test={tmp_path / 'held.txt'}").splits
    assert splits == {"train": [PROSE.encode()], "validation": [b"held out"], "test": [b"held out"]}
    assert open_texts(f"text:{book}?test={tmp_path / 'held.txt'}").splits == {
        "train": [PROSE.encode()],
        "test": [b"held out"],
    }


def test_several_files_are_several_documents(book: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt.gz"
    other.write_bytes(gzip.compress(b"another one " * 50))
    splits = open_texts(f"text:{book},{other}?validation=0&test=0.5").splits
    assert len(splits["train"]) == len(splits["test"]) == 2
    assert joined(splits["train"][1:]) + joined(splits["test"][1:]) == b"another one " * 50


def test_a_folder_whose_names_tell_the_splits(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens.xz").write_bytes(lzma.compress(split.encode()))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.txt").write_text("no")
    assert open_texts(tmp_path).splits == {"train": [b"train"], "validation": [b"valid"], "test": [b"test"]}
    (tmp_path / "notes.txt").write_text("which split?")
    with pytest.raises(ValueError, match=r"notes.txt: its name tells no split"):
        open_texts(tmp_path)


def test_rows_of_a_table_are_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": ["a", "b", "c"], "text": ["one", None, "three"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    pyarrow.parquet.write_table(table.slice(2), tmp_path / "test.parquet")
    assert open_texts(f"parquet:{tmp_path}").splits == {"train": [b"one", b"three"], "test": [b"three"]}
    assert open_texts(f"{tmp_path}?text=id").splits["train"] == [b"a", b"b", b"c"]
    with pytest.raises(ValueError, match=r"no column of text 'n'; there are id, text"):
        open_texts(f"parquet:{tmp_path}?text=n")
    pyarrow.parquet.write_table(table.drop(["text"]).append_column("t", table["id"]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"several columns of text \(id, t\); name one by \?text=COLUMN"):
        open_texts(f"parquet:{tmp_path / 'train.parquet'}")


def test_a_separator_divides_and_stays() -> None:
    assert divide(b"a\n\nb\n\n\n\nc", "\n\n") == [b"a\n\n", b"b\n\n", b"c"]
    assert divide(b"a\n\nb", None) == [b"a\n\nb"]
    assert divide(b"", None) == []


def test_many_documents_are_held_out_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"document {number}" for number in range(100)))
    splits = open_texts(f"text:{tmp_path / 'a.txt'}", "\n\n").splits
    assert {split: len(documents) for split, documents in splits.items()} == {"train": 90, "validation": 5, "test": 5}
    assert not set(splits["train"]) & set(splits["test"])


def test_a_cut_never_splits_a_character() -> None:
    text = "ä€𝄞" * 10
    for share in (0.1, 0.33, 0.5, 0.77):
        parts = cut(text.encode(), [share, 1 - share])
        assert "".join(part.decode() for part in parts) == text


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"", ".txt", "the file is empty"),
        (lzma.compress(b"x" * 1000)[:40], ".xz", "damaged or cut off"),
        (gzip.compress(b"x" * 1000, mtime=0)[:20], ".gz", "damaged or cut off"),
        (b"no gzip", ".gz", "damaged or cut off"),
    ],
    ids=["empty", "half an xz", "half a gzip", "no gzip"],  # of their own: every worker must collect the same names
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, suffix: str, message: str) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad{suffix}: {message}"):
        read_text(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:", "nothing after the colon"),
        ("text:BOOK?share=0.1", "got option 'share'; takes test, validation"),
        ("text:BOOK?validation=0.6&test=0.5", "nothing is left to train"),
        ("text:BOOK?validation=0&test=0", "hold out text for one of them"),
        ("text:BOOK?test=1.5", "takes a share of at least 0 and below 1"),
        ("poems", "no such source and no such folder or file; takes documentation, text:FILE"),
    ],
)
def test_bad_sources_are_named(book: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_texts(spec.replace("BOOK", str(book)))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.txt: no such file"):
        open_texts(f"text:{tmp_path / 'nothing.txt'}")
    with pytest.raises(ValueError, match=r"no text files; takes \.txt"):
        open_texts(f"text:{tmp_path}")
    with pytest.raises(TypeError, match="got int, takes text"):
        open_texts(3)  # type: ignore[arg-type]


def test_parse_spec_keeps_hub_options() -> None:
    assert parse_spec("hf:owner/name?config=raw&text=body") == ("hf", "owner/name", {"config": "raw", "text": "body"})


def test_a_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as that goes without a network: what `datasets` loads becomes documents."""
    import datasets

    rows = {"train": ["one", "", "two", "three"], "validation": ["four"], "unsupervised": ["five"], "test": ["six"]}
    loaded = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"id": list(map(str, texts)), "text": texts}) for name, texts in rows.items()}
    )
    loaded["train"] = loaded["train"].select([3, 0, 1])
    calls: list[tuple] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: calls.append(arguments) or loaded)
    texts = open_texts("hf:owner/books?config=raw")
    assert calls == [("owner/books", "raw")]
    assert texts.splits == {"train": [b"three", b"one"], "validation": [b"four"], "test": [b"six"]}
    with pytest.raises(ValueError, match=r"hf:owner/books: no column of text 'body'; there are id, text"):
        open_texts("hf:owner/books?text=body")

    def offline(*_: object) -> None:
        raise ConnectionError("no route to the hub\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"hf:books: cannot be loaded: ConnectionError: no route to the hub \(without"):
        open_texts("hf:books")


def test_documentation_is_half_a_megabyte_of_different_paragraphs() -> None:
    splits = open_texts("documentation").splits
    sizes = {split: sum(map(len, documents)) for split, documents in splits.items()}
    assert sum(sizes.values()) > 500_000
    assert min(sizes["validation"], sizes["test"]) > 20_000
    known = {line for document in splits["train"] for line in document.split(b"\n\n") if len(line) >= 200}
    held = {line for document in splits["test"] for line in document.split(b"\n\n") if len(line) >= 200}
    assert held
    assert not known & held


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not at hand (COTERIE_SHARED_DATA)")
def test_shared_folders_open_as_they_are() -> None:
    def sizes(name: str) -> list[int]:
        return [sum(map(len, documents)) for documents in open_texts(SHARED / name).splits.values()]

    assert sizes("text_enwik8_4m") == [3_600_000, 200_000, 200_000]
    assert sizes("text_wikitext2")[0] == 10_797_148
    assert sum(sizes("text_tinyshakespeare")) == 1_115_394
