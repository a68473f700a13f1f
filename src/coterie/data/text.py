"""Text with its tokenizer: what language models are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from coterie.data.packing import Stream, TextConfig
from coterie.data.texts import open_texts
from coterie.data.tokenizers import TextTokenizer, make_tokenizer

MAX_UNKNOWN_SHARE = 0.01


@dataclass
class TextFacts:
    """What of text and tokenizer a trained model has to remember; plain data.

    Attributes:
        kind: Of the tokenizer (`coterie.data.tokenizers.KINDS`, or "file").
        vocab_size: Token ids are below this.
        end: Id of the token between documents.
        sequence_length: Tokens of a row.
        several_documents: Whether there was more than one document to train on.
        separate: Whether tokens attend within their document only.
        eval_stride: As in TextConfig.
        separator: As in TextConfig.
        splits: For each split its `bytes`, `characters`, `documents`, `tokens` and `unknown` (tokens for characters
            that the tokenizer does not know).
    """

    kind: str
    vocab_size: int
    end: int
    sequence_length: int
    several_documents: bool
    separate: bool
    eval_stride: int | None = None
    separator: str | None = None
    splits: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class TextSource:
    """Opened text, as tokens.

    Attributes:
        name: The source.
        splits: `train` and `test`, and `validation` where there is one.
        tokenizer: Made for the training split, or the one that was given.
        facts: About both.
    """

    name: str
    splits: Mapping[str, Stream]
    tokenizer: TextTokenizer
    facts: TextFacts
    classes: ClassVar[list[str]] = []
    target: ClassVar[str] = "text"
    has_masks: ClassVar[bool] = False

    def describe(self) -> str:
        """One line for people."""
        facts = self.facts.splits
        sizes = ", ".join(
            f"{split} {_size(known['bytes'])} ({known['tokens']:,} tokens)" for split, known in facts.items()
        )
        documents = facts["train"]["documents"] if "train" in facts else 0
        several = f" in {documents:,} documents" if documents > 1 else ""
        return f"{self.name}: {sizes}{several}; {self.facts.kind} tokenizer, vocabulary of {self.facts.vocab_size:,}"


def open_text(spec: str, config: TextConfig, tokenizer: TextTokenizer | None = None) -> TextSource:
    """Open text and turn it into tokens.

    Args:
        spec: As `coterie.data.texts.open_texts` takes it.
        config: Tokenizer, rows, documents.
        tokenizer: One that is there already, for data that a trained model is asked about; else it is made.

    Raises:
        FileNotFoundError, ValueError: as `open_texts` and `make_tokenizer`; or more than 1 % of a split is of
            characters that the tokenizer does not know.
    """
    check_text_config(config)
    separator = config.separator.replace("\\n", "\n").replace("\\t", "\t") if config.separator else None
    texts = open_texts(spec, separator)
    if tokenizer is None:
        tokenizer = make_tokenizer(config.tokenizer, texts.splits["train"], config.vocab_size, texts.name)
    streams, facts = {}, {}
    for split, documents in texts.splits.items():
        ids = [tokenizer.encode(document, f"{texts.name} ({split})") for document in documents]
        unknown = _unknown(ids, documents, tokenizer, f"{texts.name} ({split})")
        tokens = _join(ids, tokenizer)
        characters = sum(len(document.decode("utf-8", "replace")) for document in documents)
        streams[split] = Stream(tokens, sum(map(len, documents)), characters)
        facts[split] = {"bytes": streams[split].size_bytes, "characters": characters, "documents": len(documents),
                        "tokens": len(tokens), "unknown": unknown}  # fmt: skip
    several = facts["train"]["documents"] > 1
    known = TextFacts(
        tokenizer.kind, tokenizer.vocab_size, tokenizer.end, config.sequence_length, several,
        several and not config.attend_across, config.eval_stride, separator, facts,
    )  # fmt: skip
    return TextSource(texts.name, streams, tokenizer, known)


def check_text_config(config: TextConfig) -> None:
    """Refuse values out of their range. Raises ValueError naming the field."""
    if config.sequence_length < 2:
        raise ValueError(f"text.sequence_length is {config.sequence_length}; it takes at least 2")
    if config.eval_stride is not None and not 1 <= config.eval_stride <= config.sequence_length:
        raise ValueError(f"text.eval_stride is {config.eval_stride}; it takes 1 to text.sequence_length, "
                         f"{config.sequence_length}")  # fmt: skip


def _join(ids: Sequence[np.ndarray], tokenizer: TextTokenizer) -> np.ndarray:
    kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    tokens = np.empty(sum(map(len, ids)) + len(ids), dtype=kind)
    at = 0
    for document in ids:
        tokens[at] = tokenizer.end
        tokens[at + 1 : at + 1 + len(document)] = document
        at += 1 + len(document)
    return tokens


def _unknown(ids: Sequence[np.ndarray], documents: Sequence[bytes], tokenizer: TextTokenizer, name: str) -> int:
    """Tokens that stand for characters outside a vocabulary of characters. Raises ValueError where they are many."""
    if tokenizer.unknown is None:
        return 0
    unknown = sum(int((document == tokenizer.unknown).sum()) for document in ids)
    if unknown > MAX_UNKNOWN_SHARE * sum(map(len, ids)):
        known = set(tokenizer.tokenizer.get_vocab())
        strange = sorted({c for document in documents for c in document.decode()} - known)
        shown = ", ".join(map(repr, strange[:5])) + (", ..." if len(strange) > 5 else "")
        raise ValueError(
            f"{name}: {unknown:,} characters, more than {MAX_UNKNOWN_SHARE:.0%}, are none of the vocabulary ({shown}); "
            "take --text.tokenizer bytes or bpe, or train on text that has them"
        )
    return unknown


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
