"""Text to token ids and back: bytes, characters, byte-pair encoding trained on the spot, or any tokenizer.json.

Every one of them is a `tokenizers.Tokenizer`, so what a run keeps (`tokenizer.json`) opens with Hugging Face's
libraries too. Each vocabulary holds one token that separates documents; it begins every document of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

END = "<|endoftext|>"
UNKNOWN = "\ufffd"
KINDS = ("bytes", "characters", "bpe")
KNOWN_ENDS = (END, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
PIECE = 1 << 18  # characters encoded at once: the library keeps far more beside each token than its number


class TextTokenizer:
    """A tokenizer of one of `KINDS`, or "file" for one that was given.

    Args:
        kind: How ids are made.
        tokenizer: The `tokenizers.Tokenizer`.

    Attributes:
        end: Id of the token between documents.
        vocab_size: Ids are below this.
    """

    def __init__(self, kind: str, tokenizer: Any) -> None:
        self.kind, self.tokenizer = kind, tokenizer
        found = (tokenizer.token_to_id(name) for name in KNOWN_ENDS)
        end = next((number for number in found if number is not None), None)
        if end is None:
            tokenizer.add_special_tokens([END])
            end = tokenizer.token_to_id(END)
        self.end: int = end
        self.vocab_size: int = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self.unknown: int | None = tokenizer.token_to_id(UNKNOWN) if kind == "characters" else None
        if self.unknown is not None:
            self._characters = np.array(sorted(map(ord, self._single())), dtype=np.uint32)

    def encode(self, document: bytes, name: str = "the text") -> Int64[np.ndarray, " tokens"]:
        """The ids of a document, without `end`.

        Raises:
            ValueError: bytes that are not UTF-8, for all kinds but "bytes".
        """
        if self.kind == "bytes":
            return np.frombuffer(document, dtype=np.uint8).astype(np.int64)
        text = decoded(document, name)
        if self.unknown is not None:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
            at = np.searchsorted(self._characters, points).clip(max=len(self._characters) - 1)
            return np.where(self._characters[at] == points, at, self.unknown).astype(np.int64)
        pieces = _pieces(text) if self.kind == "bpe" else [text]
        encoded = self.tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        return np.concatenate([np.asarray(piece.ids, dtype=np.int64) for piece in encoded] or [np.zeros(0, np.int64)])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; `end` is left out."""
        return self.tokenizer.decode(
            [number for number in map(int, ids) if number != self.end], skip_special_tokens=False
        )

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self.tokenizer.to_str(pretty=False)

    def _single(self) -> list[str]:
        return [token for token in self.tokenizer.get_vocab(with_added_tokens=False) if token not in (END, UNKNOWN)]


def decoded(document: bytes, name: str) -> str:
    """Bytes as UTF-8 text. Raises ValueError saying where they are none."""
    try:
        return document.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: byte {error.start:,} ({document[error.start]:#04x}) is not UTF-8; take --text.tokenizer bytes"
        ) from error


def make_tokenizer(spec: str, documents: Sequence[bytes], vocab_size: int, name: str = "the text") -> TextTokenizer:
    """A tokenizer for training text.

    Args:
        spec: One of KINDS, or the path of a tokenizer.json (or of the folder that holds it).
        documents: Of the training split, and of no other.
        vocab_size: Size of a vocabulary that is trained (bpe), `END` included.
        name: The source, as errors call it.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no tokenizer, or a value out of its range.
    """
    if spec == "bytes":
        return TextTokenizer("bytes", _bytes())
    if spec == "characters":
        found = sorted({character for document in documents for character in decoded(document, name)} - {UNKNOWN})
        return TextTokenizer("characters", _characters(found))
    if spec == "bpe":
        return TextTokenizer("bpe", _train_bpe([decoded(document, name) for document in documents], vocab_size))
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"text.tokenizer is {spec!r}: no such file; takes {', '.join(KINDS)} or a tokenizer.json"
        )
    return load_tokenizer("file", path.read_text("utf-8"), str(path))


def load_tokenizer(kind: str, text: str, name: str = "tokenizer.json") -> TextTokenizer:
    """The tokenizer in the text of a tokenizer.json. Raises ValueError if it holds none."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{name} is no tokenizer.json: {' '.join(str(error).split())[:200]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextTokenizer(kind, tokenizer)


def _bytes() -> Any:
    """Token b is byte b; as text each byte is written as GPT-2's alphabet of visible characters has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    names = {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    tokenizer = Tokenizer(models.BPE(vocab={names[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _characters(found: Sequence[str]) -> Any:
    """Characters by their code points; then one token for all others."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {character: number for number, character in enumerate([*found, UNKNOWN])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _train_bpe(texts: Sequence[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(
            f"text.vocab_size is {vocab_size}; bpe takes at least 257: all bytes, and the end of a document"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return tokenizer


def _pieces(text: str) -> list[str]:
    """The text in pieces that end with a line."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1
        pieces.append(text[start : end or len(text)])
        start = end or len(text)
    return pieces
