"""Plain text as data: what a person names on the command line becomes documents, in splits.

    documentation    of Python, scikit-learn and PyTorch: needs no file
    text:FILE,...    files, .xz and .gz too; cut into splits in the order of their bytes, unless splits are named
    parquet:PATH     a column of text; each row is a document
    hf:NAME          a set of the Hugging Face hub; each row is a document
    PATH             a folder or a file: guessed from what lies there

A document is kept as the bytes that were read, because bits per byte are counted over these.
"""

from __future__ import annotations

import gzip
import itertools
import lzma
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.data.source import split_of

DEFAULT = "documentation"
TAKES = f"{DEFAULT}, text:FILE[,FILE...], text:FOLDER, parquet:PATH, hf:NAME, or the path of a folder or file"
SUFFIXES = (".txt", ".text", ".tokens", ".raw", ".md", ".rst")
PACKED = (".xz", ".gz")
SHARE = 0.05  # of validation, and of test, where a source has no such splits
FEW_DOCUMENTS = 20  # below this, shares are cut by bytes instead of whole documents

_OPTIONS: dict[str, set[str]] = {
    "text": {"validation", "test"},
    "parquet": {"text", "validation", "test"},
    "hf": {"text", "config", "validation", "test"},
}


@dataclass
class Texts:
    """What was read.

    Attributes:
        name: The source, as errors call it.
        splits: `train`, `validation` and `test`, in this order, as far as the source has them: their documents.
    """

    name: str
    splits: dict[str, list[bytes]]


def open_texts(spec: str | os.PathLike[str], separator: str | None = None) -> Texts:
    """Read a source of text.

    Args:
        spec: See the module. Options follow a question mark: `text:book.txt?validation=0.1&test=0` holds out a tenth in
            the order of the bytes, `text:a.txt?validation=b.txt&test=c.txt` names the files of the splits.
        separator: Text between documents; it stays with the document that it ends. None: a file, or a row of a table,
            is one document.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: an unknown source, an empty or damaged file, or shares that leave nothing to train on.
    """
    if not isinstance(spec, str | os.PathLike):
        raise TypeError(f"data source: got {type(spec).__name__}, takes text: {TAKES}")
    spec = os.fspath(spec)
    kind, place, options = parse_spec(spec)
    if kind == DEFAULT:
        from coterie.data.documentation import documentation

        texts = Texts(DEFAULT, {"train": documentation()})
    elif kind == "text":
        texts = _open_files(place, options)
    else:
        texts = _open_table(kind, place, options)
    texts.splits = {
        split: [part for document in documents for part in divide(document, separator)]
        for split, documents in texts.splits.items()
    }
    texts.splits = _hold_out(texts, options)
    for split, documents in texts.splits.items():
        if not any(documents):
            raise ValueError(f"{texts.name}: there is no text in the {split} split")
    return texts


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """Split a source into kind, place and options. Raises as `open_texts`."""
    if spec == DEFAULT:
        return DEFAULT, "", {}
    kind, colon, place = spec.partition(":")
    if not colon or kind not in _OPTIONS:
        kind, place = _guess(spec), spec
    if not place:
        raise ValueError(f"data source {spec!r}: nothing after the colon; takes {TAKES}")
    place, mark, query = place.partition("?")
    if not mark:
        return kind, place, {}
    pairs = [pair.partition("=") for pair in query.split("&")]
    takes = sorted(_OPTIONS[kind])
    for name, equals, value in pairs:
        if name not in takes or not equals or not value:
            raise ValueError(f"data source {spec!r}: got option {name!r}; takes {', '.join(takes)}, each with =VALUE")
    return kind, place, {name: value for name, _, value in pairs}


def divide(document: bytes, separator: str | None) -> list[bytes]:
    """The documents in `document`; each keeps the separator that ends it. Empty ones are left out."""
    if not separator:
        return [document] if document else []
    mark = separator.encode()
    parts = document.split(mark)
    return [part + mark * (number < len(parts) - 1) for number, part in enumerate(parts) if part]


def read_text(path: Path) -> bytes:
    """The bytes of a file, unpacked. Raises FileNotFoundError, and ValueError for an empty or damaged one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; takes {TAKES}")
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            content: bytes = file.read()
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut off: {error}") from error
    if not content:
        raise ValueError(f"{path}: the file is empty")
    return content


def cut(document: bytes, shares: Sequence[float]) -> list[bytes]:
    """Cut a document into parts with these shares of its bytes, in order, none inside a UTF-8 character."""
    bounds, total = [0], 0.0
    for share in shares[:-1]:
        total += share
        bound = round(total * len(document))
        while 0 < bound < len(document) and document[bound] & 0xC0 == 0x80:
            bound -= 1
        bounds.append(bound)
    bounds.append(len(document))
    return [document[first:end] for first, end in itertools.pairwise(bounds)]


def _guess(spec: str) -> str:
    path = Path(spec.partition("?")[0]).expanduser()
    if path.suffix == ".parquet" and path.is_file():
        return "parquet"
    if path.is_dir():
        found = any(next(path.glob(pattern), None) is not None for pattern in ("*.parquet", "data/*.parquet"))
        return "parquet" if found else "text"
    if path.is_file():
        return "text"
    raise ValueError(f"data source {spec!r}: no such source and no such folder or file; takes {TAKES}")


def _open_files(place: str, options: dict[str, str]) -> Texts:
    first = Path(place).expanduser()
    name = first.name
    if first.is_dir():
        splits = _folder(first)
    else:
        paths = [Path(part).expanduser() for part in place.split(",")]
        splits = {"train": [read_text(path) for path in paths]}
        name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
    for split in ("validation", "test"):
        value = options.get(split)
        if value is not None and _share(value) is None:
            splits[split] = [read_text(Path(part).expanduser()) for part in value.split(",")]
    return Texts(name, splits)


def _folder(folder: Path) -> dict[str, list[bytes]]:
    """The text files of a folder, by the splits that their names (or folders) tell; without any, all to train on."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _is_text(path))
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise ValueError(f"{folder}: no text files; takes {', '.join(SUFFIXES)}, also with {' or '.join(PACKED)}")
    splits: dict[str, list[bytes]] = {}
    named = {path: _split_of(path.relative_to(folder)) for path in files}
    for path, split in named.items():
        if split is None and any(named.values()):
            raise ValueError(f"{path}: its name tells no split as those of others do; takes train, valid or test in it")
        splits.setdefault(split or "train", []).append(read_text(path))
    return splits


def _is_text(path: Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
    if path.stem.lower() in ("readme", "license"):
        return False
    return path.suffix in PACKED or bool(suffixes and suffixes[-1] in SUFFIXES)


def _split_of(path: Path) -> str | None:
    words = [word for part in path.parts for word in re.split(r"[^a-z]+", part.lower())]
    return next((split for word in words if (split := split_of(word))), None)


def _open_table(kind: str, place: str, options: dict[str, str]) -> Texts:
    from coterie.data.text_tables import open_hub_texts, open_parquet_texts

    column = options.get("text")
    if kind == "hf":
        return Texts(place, open_hub_texts(place, options.get("config"), column))
    return Texts(Path(place).name, open_parquet_texts(Path(place).expanduser(), column))


def _share(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _hold_out(texts: Texts, options: dict[str, str]) -> dict[str, list[bytes]]:
    """Give a source without validation or test split a share of the training split for it."""
    splits = dict(texts.splits)
    if "train" not in splits:
        raise ValueError(f"{texts.name}: no training text, only {', '.join(splits)}")
    shares: dict[str, float] = {}
    for split in ("validation", "test"):
        given = _share(options[split]) if split in options else None
        if given is not None and not 0 <= given < 1:
            raise ValueError(f"{texts.name}: {split}={options[split]}; takes a share of at least 0 and below 1")
        if split not in splits:
            # With a validation split of its own a source needs no other: it is then the test split as well.
            alone = set(texts.splits) == {"train"}
            shares[split] = given if given is not None else (SHARE if alone else 0.0)
    kept = 1 - sum(shares.values())
    if kept <= 0:
        raise ValueError(f"{texts.name}: validation and test take {1 - kept:.0%} of the text; nothing is left to train")
    if any(shares.values()):
        parts = _cut_documents(splits["train"], [kept, *shares.values()])
        splits |= dict(zip(["train", *shares], parts))
    if not splits.get("test"):
        if not splits.get("validation"):
            raise ValueError(f"{texts.name}: validation and test are both 0; hold out text for one of them")
        splits["test"] = splits.pop("validation")
    return {split: splits[split] for split in ("train", "validation", "test") if splits.get(split)}


def _cut_documents(documents: list[bytes], shares: Sequence[float]) -> list[list[bytes]]:
    """Whole documents where there are many of them, spread evenly over the order; else the bytes, in order."""
    if len(documents) < FEW_DOCUMENTS:
        pieces = [cut(document, shares) for document in documents]
        return [[part[number] for part in pieces if part[number]] for number in range(len(shares))]
    out: list[list[bytes]] = [[] for _ in shares]
    sizes, seen = [0] * len(shares), 0
    for document in documents:  # to the part that lacks most of its share of what has been seen
        seen += len(document)
        chosen = max(range(len(shares)), key=lambda part: shares[part] * seen - sizes[part])
        out[chosen].append(document)
        sizes[chosen] += len(document)
    return out
