"""DCFormer: prefill, chunks and single steps agree; padding, packing, caches of every kind."""

import pytest
import torch
from small_dcformer import CONFIGS, PLUS, small_dcformer, token_ids
from transformers import DynamicCache, StaticCache

TOKENS = 17  # the windows have 5


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return small_dcformer(CONFIGS[request.param])


def cache_of(kind, model):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=TOKENS + 3)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()  # the last keeps all keys


def in_chunks(model, ids, chunks, cache, mask=None):
    logits, seen = [], 0
    for part in ids.split(chunks, dim=1):
        seen += part.shape[1]
        part_mask = None if mask is None else mask[:, :seen]
        out = model(part, attention_mask=part_mask, past_key_values=cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("kind", ["dynamic", "unwindowed", "static"])
@pytest.mark.parametrize("chunks", [[1] * TOKENS, [4, 13], [5, 1, 1, 4, 6], [6, 11], [TOKENS]], ids=str)
@torch.no_grad()
def test_prefill_chunks_and_steps_agree(model, kind, chunks):
    ids = token_ids(2, TOKENS)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(in_chunks(model, ids, chunks, cache_of(kind, model)), whole)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * TOKENS, [7, 1, 9], [TOKENS]], ids=str)
@torch.no_grad()
def test_unequal_lengths_with_padding_on_the_left(model, kind, chunks):
    lengths = [TOKENS, 12, 4]
    ids = token_ids(3, TOKENS)
    mask = torch.arange(TOKENS) >= TOKENS - torch.tensor(lengths).unsqueeze(1)
    batch = in_chunks(model, ids, chunks, cache_of(kind, model), mask.long())
    assert batch.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, -length:]).logits
        torch.testing.assert_close(batch[row : row + 1, -length:], alone)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it(model):
    ids = token_ids(2, TOKENS)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, 9:] = 0
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[0, :9], model(ids[:1, :9]).logits[0])


@torch.no_grad()
def test_the_future_has_no_influence(model):
    ids = token_ids(1, TOKENS)
    other = torch.cat([ids[:, :9], token_ids(1, TOKENS - 9, seed=2)], dim=1)
    assert torch.equal(model(ids).logits[:, :9], model(other).logits[:, :9])


@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, use_cache):
    lengths = [8, 3, 6]
    ids = token_ids(1, TOKENS)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    packed = model(ids, position_ids=positions, use_cache=use_cache).logits
    alone = torch.cat([model(document).logits for document in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)


@torch.no_grad()
def test_packed_rows_may_be_longer_than_any_document():
    model = small_dcformer(max_position_embeddings=10)
    positions = torch.cat([torch.arange(n) for n in (10, 7)]).unsqueeze(0)
    assert model(token_ids(1, TOKENS), position_ids=positions).logits.shape == (1, TOKENS, 29)


@torch.no_grad()
def test_masks_of_ones_own():
    model, ids = small_dcformer(layer_pattern="G"), token_ids(2, 7)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    additive = torch.zeros(1, 1, 7, 7).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, additive, causal.long(), {"full_attention": causal}):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(ids).logits)


def test_the_cache_holds_ten_numbers_more_per_head_and_token():
    for settings, per_head in ((PLUS, 5), ({**PLUS, "num_key_value_heads": 2}, 10)):
        model = small_dcformer(settings)
        cache = model(token_ids(2, 9), use_cache=True).past_key_values
        assert cache.layers[0].keys.shape[2:] == (4, 8 + per_head)  # local: window - 1
        assert cache.layers[1].values.shape[2:] == (9, 8 + per_head)
    query_only = small_dcformer(composition_sides=["query"])
    assert query_only(token_ids(2, 9), use_cache=True).past_key_values.layers[1].keys.shape[2:] == (9, 8)


def test_greedy_generation_is_the_same_with_every_cache(model):
    ids = token_ids(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(ids, use_cache=False, **options)
    assert expected.shape == (2, 15)
    for cache in ("dynamic", "static"):
        assert torch.equal(model.generate(ids, cache_implementation=cache, **options), expected)
    alone = model.generate(ids[1:, 2:], **{**options, "attention_mask": None})
    assert torch.equal(alone[:, -9:], expected[1:, -9:])


def test_sampling_and_beams():
    model, ids = small_dcformer(), token_ids(2, 6)
    options = {"max_new_tokens": 8, "eos_token_id": -1, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    first = model.generate(ids, do_sample=True, **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, do_sample=True, use_cache=False, **options), first)
    assert not torch.equal(model.generate(ids, do_sample=True, **options), first)
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(model.generate(ids, num_beams=3, use_cache=False, **options), beams)
    assert not torch.equal(model.generate(ids, do_sample=False, **options), beams)


@torch.no_grad()
def test_beyond_the_positions_generation_says_so():
    model = small_dcformer(max_position_embeddings=10)
    with pytest.raises(ValueError, match="the sequence has 11 tokens, and max_position_embeddings is 10"):
        model.generate(token_ids(1, 8), max_new_tokens=6, eos_token_id=-1, do_sample=False)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_window_of_one_sees_only_oneself(kind):
    model, ids = small_dcformer(sliding_window=1), token_ids(2, TOKENS)
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(in_chunks(model, ids, [5, 1, 1, 10], cache_of(kind, model)), whole)
