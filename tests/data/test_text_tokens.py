"""Tokenizers, and streams of tokens cut into rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.data.packing import Stream, TextConfig, TokenLoader, document_positions
from coterie.data.text import open_text
from coterie.data.tokenizers import END, TextTokenizer, load_tokenizer, make_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog.\n\nÄpfel, 𝄞 and \ttabs: don't  stop\r\n" * 4


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_what_is_encoded_is_decoded(kind: str) -> None:
    made = make_tokenizer(kind, [TEXT.encode()], 300)
    ids = made.encode(TEXT.encode())
    assert made.decode(ids) == TEXT
    assert made.decode([made.end, *ids, made.end]) == TEXT
    assert ids.min() >= 0
    assert ids.max() < made.vocab_size
    assert made.end not in ids
    again = load_tokenizer(kind, made.to_json())
    assert (again.end, again.vocab_size) == (made.end, made.vocab_size)
    np.testing.assert_array_equal(again.encode(TEXT.encode()), ids)
    # The file means the same to Hugging Face's libraries.
    assert again.tokenizer.encode(TEXT, add_special_tokens=False).ids == ids.tolist()


def test_bytes_are_their_own_numbers_and_need_no_utf8() -> None:
    made = make_tokenizer("bytes", [], 0)
    assert made.encode(bytes(range(256))).tolist() == list(range(256))
    assert (made.end, made.vocab_size) == (256, 257)


def test_characters_that_training_lacks_are_one_token() -> None:
    made = make_tokenizer("characters", [b"cab"], 0)
    assert made.vocab_size == 5  # a, b, c, unknown, end
    assert made.encode("abcé€a".encode()).tolist() == [0, 1, 2, 3, 3, 0]


def test_bpe_has_the_size_asked_for_and_compresses() -> None:
    made = make_tokenizer("bpe", [TEXT.encode()], 300)
    assert made.vocab_size == 300
    assert len(made.encode(TEXT.encode())) < 0.6 * len(TEXT.encode())
    with pytest.raises(ValueError, match="vocab_size is 256; bpe takes at least 257"):
        make_tokenizer("bpe", [b"a"], 256)


def test_a_tokenizer_file(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).save(str(tmp_path / "tokenizer.json"))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        made = make_tokenizer(str(spec), [], 0)
        assert made.encode(b"abba").tolist() == [2, 1, 0]
        assert made.tokenizer.id_to_token(made.end) == END
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad.json is no tokenizer.json"):
        make_tokenizer(str(tmp_path / "bad.json"), [], 0)
    with pytest.raises(FileNotFoundError, match=r"'gpt9': no such file; takes bytes, characters, bpe or a tokenizer"):
        make_tokenizer("gpt9", [], 0)


def test_text_that_is_not_utf8_is_refused_where_it_matters(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1") * 100)
    with pytest.raises(ValueError, match=r"latin.txt.*: byte 0 \(0xc4\) is not UTF-8; take --text.tokenizer bytes"):
        open_text(str(tmp_path / "latin.txt"), TextConfig(tokenizer="bpe"))
    assert open_text(str(tmp_path / "latin.txt"), TextConfig(tokenizer="bytes")).facts.splits["train"]["bytes"] == 450


def test_text_of_unknown_characters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 500)
    (tmp_path / "b.txt").write_text("abc" * 500 + "xyz" * 50)
    spec = f"text:{tmp_path / 'a.txt'}?test={tmp_path / 'b.txt'}"
    with pytest.raises(ValueError, match=r"a.txt \(test\): 150 characters, more than 1%, .* \('x', 'y', 'z'\)"):
        open_text(spec, TextConfig(tokenizer="characters"))
    (tmp_path / "b.txt").write_text("abc" * 500 + "x")
    assert open_text(spec, TextConfig(tokenizer="characters")).facts.splits["test"]["unknown"] == 1


def test_a_run_s_tokenizer_reads_other_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc" * 500)
    first = open_text(str(tmp_path / "a.txt"), TextConfig(tokenizer="characters"))
    (tmp_path / "a.txt").write_text("bc" * 500)
    second = open_text(str(tmp_path / "a.txt"), TextConfig(tokenizer="characters"), first.tokenizer)
    assert second.splits["train"].tokens[:5].tolist() == [first.tokenizer.end, 1, 2, 1, 2]


def stream(count: int) -> Stream:
    return Stream(np.arange(count, dtype=np.uint16), 2 * (count - 1), count - 1)


def rows_of(loader: TokenLoader, epoch: int, start: int = 0, train: bool = True) -> list[dict]:
    return list(loader.batches(epoch, start, train))


def test_an_epoch_shows_each_token_at_most_once_in_an_order_of_its_own() -> None:
    loader = TokenLoader(stream(1003), 10, end=None, batch_size=8, seed=3)
    seen = [torch.cat([batch["labels"] for batch in rows_of(loader, epoch)]) for epoch in (0, 1)]
    for labels in seen:
        assert labels.shape == (96, 10)  # 99 rows, of which whole batches of 8
        assert labels.unique().numel() == labels.numel()
    assert not torch.equal(*seen)
    starts = [int(labels[0, 0] - 1) % 10 for labels in seen]
    assert starts[0] != starts[1]  # another offset
    first = rows_of(loader, 0)[0]
    assert torch.equal(first["tokens"] + 1, first["labels"])


def test_an_epoch_goes_on_in_its_middle_and_ranks_share_each_batch() -> None:
    whole = rows_of(TokenLoader(stream(1000), 10, end=None, batch_size=8, seed=3), 5)
    later = rows_of(TokenLoader(stream(1000), 10, end=None, batch_size=8, seed=3), 5, start=7)
    for batch, other in zip(whole[7:], later, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in batch)
    ranks = [
        rows_of(TokenLoader(stream(1000), 10, end=None, batch_size=8, seed=3, rank=rank, world_size=2), 5)
        for rank in (0, 1)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert all(torch.equal(batch[name], torch.cat([part[name] for part in parts])) for name in batch)


@pytest.mark.parametrize(("stride", "count"), [(None, 101), (4, 101), (1, 23), (10, 11), (3, 5)])
def test_evaluation_predicts_each_token_once(stride: int | None, count: int) -> None:
    loader = TokenLoader(stream(count), 10, end=None, batch_size=4, stride=stride)
    batches = rows_of(loader, 0, train=False)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert labels[labels >= 0].tolist() == list(range(1, count))
    total = sum(float(batch["bytes"].sum()) for batch in batches)
    assert total == pytest.approx(2 * (count - 1))
    assert sum(float(batch["characters"].sum()) for batch in batches) == pytest.approx(count - 1)
    if stride:  # context: what stands before a predicted token in its row
        context = [int((row >= 0).nonzero()[0]) for row in labels[1:] if (row >= 0).any()]
        assert all(length == 10 - stride for length in context)


def test_two_ranks_evaluate_what_one_does() -> None:
    alone = torch.cat(
        [batch["labels"] for batch in rows_of(TokenLoader(stream(95), 10, end=None, batch_size=4), 0, 0, False)]
    )
    parts = []
    for rank in (0, 1):
        loader = TokenLoader(stream(95), 10, end=None, batch_size=4, rank=rank, world_size=2)
        parts += [batch["labels"][batch["index"] >= 0] for batch in rows_of(loader, 0, train=False)]
    assert torch.cat(parts).sort(dim=0).values.equal(alone.sort(dim=0).values)


def test_positions_start_anew_with_each_document() -> None:
    tokens = torch.tensor([[5, 6, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6, 7]])
    assert document_positions(tokens, 0).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], list(range(8))]


def test_documents_are_kept_apart_where_there_are_several(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    spec = f"text:{tmp_path / 'a.txt'}?test={tmp_path / 'a.txt'}"
    source = open_text(spec, TextConfig(tokenizer="bytes", separator="\\n\\n", sequence_length=4))
    assert source.splits["train"].tokens.tolist() == [256, *b"one\n\n", 256, *b"two\n\n", 256, *b"three"]
    assert source.facts.separate
    assert source.splits["train"].size_bytes == len("one\n\ntwo\n\nthree")
    across = open_text(spec, TextConfig(tokenizer="bytes", separator="\n\n", sequence_length=4, attend_across=True))
    assert across.facts.several_documents
    assert not across.facts.separate
    assert not open_text(spec, TextConfig(tokenizer="bytes", sequence_length=4)).facts.separate


def test_bad_values_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the training text has 12 tokens, too few for rows of 10"):
        rows_of(TokenLoader(stream(12), 10, end=None, batch_size=1), 0)
    with pytest.raises(ValueError, match="start_batch: got 99"):
        TokenLoader(stream(100), 10, end=None, batch_size=1).batches(0, 99)
    with pytest.raises(ValueError, match="batch_size: got 3, takes a positive multiple of the 2 ranks"):
        TokenLoader(stream(100), 10, end=None, batch_size=3, world_size=2)
    with pytest.raises(ValueError, match="stream: got 1 tokens"):
        TokenLoader(stream(1), 10, end=None, batch_size=1)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match=r"text.sequence_length is 1; it takes at least 2"):
        open_text(str(tmp_path / "a.txt"), TextConfig(sequence_length=1))
    with pytest.raises(ValueError, match=r"text.eval_stride is 300; it takes 1 to text.sequence_length, 256"):
        open_text(str(tmp_path / "a.txt"), TextConfig(eval_stride=300))


def test_a_tokenizer_without_an_end_gets_one() -> None:
    from tokenizers import Tokenizer, models

    made = TextTokenizer("file", Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    assert made.vocab_size == made.end + 1 == 3
