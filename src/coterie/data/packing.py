"""Documents as one stream of tokens, cut into rows of equal length: every token is predicted, and nothing is padding.

    stream          END document END document END document
    inputs          stream[s : s + length]               of a row that starts at s
    labels          stream[s + 1 : s + length + 1]
    positions       start anew at every END, unless documents may attend across: models then keep documents apart

So the first token of a document is predicted from END, and END from the document that it ends; no label crosses a
border. The rows of training epoch e start at an offset, and come in an order, that are functions of (seed, e); ranks
take slices of each global batch, and an epoch can start at any batch. Evaluation goes through the stream in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from coterie.data.randomness import hash_key, permutation

IGNORED = -100
PADDING = -1


@dataclass
class TextConfig:
    """How text becomes rows of tokens; for language modelling only.

    Attributes:
        tokenizer: `bytes`, `characters`, `bpe` (trained on the training split), or the path of a tokenizer.json.
        vocab_size: Size of the vocabulary that `bpe` is trained to.
        sequence_length: Tokens of a row, the longest context in training.
        separator: Text that ends a document inside a file or row, for example `\\n\\n`; by default none does.
        attend_across: Let tokens attend to earlier documents in their row.
        eval_stride: In evaluation, step from one row to the next: below sequence_length every token is predicted from
            at least sequence_length - eval_stride earlier ones, at the price of more rows. By default rows do not
            overlap.
    """

    tokenizer: str = "bpe"
    vocab_size: int = 2048
    sequence_length: int = 256
    separator: str | None = None
    attend_across: bool = False
    eval_stride: int | None = None


class Stream(NamedTuple):
    """The tokens of a split, and how much text they stand for."""

    tokens: Int[np.ndarray, " tokens"]
    size_bytes: int
    characters: int


class TokenLoader:
    """Batches of rows of one stream.

    Args:
        stream: Of a split.
        length: Tokens of a row.
        end: Id of the token that begins a document; None lets documents attend across.
        batch_size: Rows in a GLOBAL batch, over all ranks.
        seed: Of offset and order.
        rank, world_size: Which slice of each global batch this process gets.
        stride: In evaluation, tokens from one row to the next; None for `length`.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        stream: Stream,
        length: int,
        *,
        end: int | None,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        stride: int | None = None,
    ) -> None:
        if len(stream.tokens) < 2:
            raise ValueError(f"stream: got {len(stream.tokens)} tokens, takes at least 2")
        if length < 1:
            raise ValueError(f"length: got {length}, takes at least 1")
        if stride is not None and not 1 <= stride <= length:
            raise ValueError(f"text.eval_stride is {stride}; takes 1 to {length}, the tokens of a row")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size: got {batch_size}, takes a positive multiple of the {world_size} ranks")
        self.stream, self.length, self.end = stream, length, end
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.stride = stride or length
        self.bad: dict[str, str] = {}  # text has no bad samples; the engine asks every loader

    def num_rows(self, train: bool = True) -> int:
        """Rows in an epoch. In training the same number whatever the offset."""
        targets = len(self.stream.tokens) - 1
        if train:
            return (targets + 1 - self.length) // self.length
        return 1 + math.ceil(max(targets - self.length, 0) / self.stride)

    def num_batches(self, train: bool = True) -> int:
        """Batches in an epoch. Training drops an incomplete last one; less than a batch is repeated.

        Raises:
            ValueError: too little text for one row of training.
        """
        if train:
            if self.num_rows() < 1:
                raise ValueError(
                    f"the training text has {len(self.stream.tokens):,} tokens, too few for rows of {self.length}: it "
                    f"takes {2 * self.length} at least; lower text.sequence_length"
                )
            return max(self.num_rows() // self.batch_size, 1)
        return math.ceil(self.num_rows(train=False) / self.batch_size)

    def batches(self, epoch: int, start_batch: int = 0, train: bool = True) -> Iterator[dict[str, Tensor]]:
        """This rank's slices of the batches of an epoch, from `start_batch` on.

        Yields:
            "tokens" and "labels" int64 (batch, length), labels -100 where there is nothing to predict; "positions"
            int64 (batch, length) where documents are kept apart; "index" int64 (batch,), the row, -1 for rows that only
            fill up the last batch of several ranks; in evaluation "bytes" and "characters" float64 (batch,), that row's
            part of the text.

        Raises:
            ValueError: `start_batch` is beyond the epoch; and as `num_batches`.
        """
        total = self.num_batches(train)
        if not 0 <= start_batch <= total:
            raise ValueError(f"start_batch: got {start_batch}, takes 0 to {total}, the batches of an epoch")
        order, offset = self._order(epoch, train)
        return (self._batch(self._slice(order, number), offset, train) for number in range(start_batch, total))

    def close(self) -> None:
        """Nothing to end: there are no workers."""

    def _order(self, epoch: int, train: bool) -> tuple[Int64[np.ndarray, " rows"], int]:
        """Rows in the order of an epoch, and the offset of the first."""
        count = self.num_rows(train)
        if train:
            offset = int(hash_key(self.seed, epoch, self.length)[0] % np.uint64(self.length))
            return np.resize(permutation(count, self.seed, epoch), self.num_batches() * self.batch_size), offset
        return np.concatenate([np.arange(count), np.full(-count % self.world_size, PADDING)]), 0

    def _slice(self, order: Int64[np.ndarray, " rows"], batch: int) -> Int64[np.ndarray, " slice"]:
        whole = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        share = len(whole) // self.world_size
        return whole[self.rank * share : (self.rank + 1) * share]

    def _batch(self, rows: Int64[np.ndarray, " rows"], offset: int, train: bool) -> dict[str, Tensor]:
        tokens, length = self.stream.tokens, self.length
        step = length if train else self.stride
        start = rows.clip(min=0) * step + offset
        at = start[:, None] + np.arange(length + 1)
        chunk = tokens[at.clip(max=len(tokens) - 1)].astype(np.int64)
        inputs, labels = chunk[:, :-1], chunk[:, 1:].copy()
        labels[at[:, 1:] >= len(tokens)] = IGNORED
        if not train:
            overlap = (rows > 0)[:, None] & (np.arange(length) < length - step)
            labels[overlap] = IGNORED
        batch: dict[str, Any] = {"tokens": torch.from_numpy(inputs.copy()), "labels": torch.from_numpy(labels)}
        if self.end is not None:
            batch["positions"] = document_positions(batch["tokens"], self.end)
        batch["index"] = torch.from_numpy(rows.copy())
        if not train:
            share = torch.from_numpy((labels != IGNORED).sum(axis=1)).double() / (len(tokens) - 1)
            batch["bytes"], batch["characters"] = share * self.stream.size_bytes, share * self.stream.characters
        return batch


def document_positions(tokens: Int64[Tensor, "batch tokens"], end: int) -> Int64[Tensor, "batch tokens"]:
    """Positions that count from the last `end`, or from the start of the row before the first."""
    at = torch.arange(tokens.shape[1]).expand_as(tokens)
    starts = torch.where(tokens == end, at, 0).cummax(dim=1).values
    return at - starts
