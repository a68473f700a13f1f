"""The task of language modelling: losses, documents, figures, models by name, sizes, samples."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from coterie.data.packing import document_positions
from coterie.data.text import TextFacts
from coterie.data.tokenizers import make_tokenizer
from coterie.tasks import create_task
from coterie.tasks._language_models import build_language_model, count_parameters, describe_size

TOKENIZER = make_tokenizer("bytes", [], 0)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
FACTS = TextFacts("bytes", 257, 256, 16, several_documents=True, separate=True)


def task(**options: object):
    return create_task("language-modeling", classes=[], text=FACTS, tokenizer=TOKENIZER, **options)


def model(name: str, seed: int = 0, facts: TextFacts = FACTS, **options: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_language_model(name, {**SMALL, **options}, facts).eval()


def batch(rows: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(0, 256, (rows, length + 1))
    tokens[:, 6] = 256
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:].clone(),
        "positions": document_positions(tokens[:, :-1], 256),
        "index": torch.arange(rows),
        "bytes": torch.full((rows,), float(length), dtype=torch.float64),
        "characters": torch.full((rows,), length / 2, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", ["dcformer", "llama"])
def test_documents_in_a_row_do_not_see_each_other(name: str) -> None:
    network, packed = model(name), batch()
    with torch.no_grad():
        logits = task().predict(network, packed)
        first = network(input_ids=packed["tokens"][:, :6], use_cache=False).logits
        second = network(input_ids=packed["tokens"][:, 6:], use_cache=False).logits
        across = task().predict(network, {name: packed[name] for name in ("tokens", "labels")})
    torch.testing.assert_close(logits, torch.cat([first, second], 1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits[:, 7:], across[:, 7:], atol=1e-4)


def test_the_loss_is_the_mean_over_the_labels_and_that_of_transformers() -> None:
    network, rows = model("llama"), batch()
    del rows["positions"]
    got = task().loss(network, rows)
    whole = torch.cat([rows["tokens"], rows["labels"][:, -1:]], dim=1)
    theirs = model("llama", facts=TextFacts("bytes", 257, 256, 17, False, False))
    torch.testing.assert_close(got["loss"], theirs(whole, labels=whole, use_cache=False).loss)
    assert got["loss"].dtype == torch.float32
    rows["labels"][0, 3:] = -100
    got = task().loss(network, rows)
    logits = task().predict(network, rows)
    expected = functional.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten())
    torch.testing.assert_close(got["loss"], expected)
    torch.testing.assert_close(float(got["output"].sum()), expected.item() * 19, rtol=1e-5, atol=0)


def test_figures_count_over_tokens_bytes_and_characters() -> None:
    judge, rows = task(), batch()
    metrics = judge.metrics()
    for output in (torch.tensor([10.0, 22.0]), torch.tensor([6.0, 26.0])):
        judge.update(metrics, output.double(), rows)
    figures = judge.report(metrics)
    assert figures["loss"] == pytest.approx(1.0)
    assert figures["perplexity"] == pytest.approx(math.e)
    assert figures["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert figures["bits_per_character"] == pytest.approx(2 / math.log(2))
    assert judge.comment(metrics) == ["64 tokens, 64 bytes, 32 characters"]
    assert not judge.larger_is_better


def test_a_batch_of_only_padding_is_refused() -> None:
    rows = batch()
    rows["labels"][:] = -100
    with pytest.raises(ValueError, match="a batch of 2 rows holds nothing to predict: all of it is padding"):
        task().loss(model("dcformer"), rows)


def test_token_ids_out_of_range_and_rows_beyond_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="input_ids must be from 0 to 256, the vocabulary, got 0 to 300"):
        model("dcformer")(torch.tensor([[0, 300]]))
    with pytest.raises(ValueError, match="rows have 16 tokens and the model 8 positions; lower"):
        model("dcformer", max_position_embeddings=8)
    with pytest.raises(ValueError, match="token ids go up to 256 and the model's vocab_size is 100"):
        model("llama", vocab_size=100)


def test_models_by_name() -> None:
    for name in ("dcformer", "llama", "qwen3", "gpt_neox"):
        built = model(name)
        assert built.config.vocab_size == 257
        assert built.config.max_position_embeddings == 16
        assert built.config.initializer_range == 0.02
        assert built(torch.zeros(1, 16, dtype=torch.int64)).logits.shape == (1, 16, 257)
    with torch.device("meta"):
        assert build_language_model("dcformer_405m", {}, FACTS).config.hidden_size == 1024
    with pytest.raises(ValueError, match=r"model 'lama': takes dcformer, dcformer_405m, .*; did you mean llama"):
        model("lama")
    with pytest.raises(ValueError, match=r"model\.options\.hiden_size: dcformer has no such field"):
        model("dcformer", hiden_size=3)


def test_a_model_without_positions_cannot_keep_documents_apart() -> None:
    with pytest.raises(ValueError, match="model bloom takes no position_ids, which keep documents apart"):
        build_language_model("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, FACTS)


@pytest.mark.parametrize("name", ["dcformer", "llama"])
def test_equal_parameters_by_the_width_of_the_feed_forward(name: str) -> None:
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    built = build_language_model(name, options, FACTS, parameters=60_000)
    assert abs(count_parameters(built)[0] - 60_000) <= 96  # half of what one more channel costs
    with pytest.raises(ValueError, match=r"task\.options\.parameters is 1,000; without feed-forward the model has"):
        build_language_model(name, options, FACTS, parameters=1_000)


def test_sizes_and_operations_of_a_model() -> None:
    plain = model("dcformer", composition_uses=[], layer_pattern="G")
    facts = describe_size(plain, 16)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 257 * 32
    attention = 2 * 2 * 32 * 2 * (17 / 2)  # scores and sums; two layers; half of a row of keys on average
    assert facts["parameters"] == facts["parameters_without_embeddings"] + 2 * 257 * 32
    assert facts["flops_per_token"] == round(3 * (2 * matrices + attention))
    composed = describe_size(model("dcformer", layer_pattern="G"), 16)
    inner = composed["parameters"] - facts["parameters"]
    assert composed["flops_per_token"] == facts["flops_per_token"] + round(3 * (2 * inner + 2 * 20 * 2 * 2 * 17 / 2))
    window = describe_size(model("dcformer", composition_uses=[], layer_pattern="LG", sliding_window=1), 16)
    assert facts["flops_per_token"] - window["flops_per_token"] == round(3 * 2 * 2 * 32 * (17 / 2 - 1))


def test_samples_are_functions_of_the_seed_and_go_on_beyond_the_positions() -> None:
    network = model("dcformer", seed=5).train()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    judge = task(prompt="ab", sample_tokens=40, temperature=1.0)
    first, again, other = (judge.sample(network, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.startswith("ab")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert network.training
    assert task(sample_tokens=0).sample(network, 1) is None
    greedy = [judge.generate(network, "ab", 8, seed=seed, temperature=0.0) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_generation_ends_with_the_document() -> None:
    from coterie.tasks._sampling import generate_tokens

    network = model("llama")
    with torch.no_grad():
        network.lm_head.weight.zero_()
        network.lm_head.weight[256] = 1.0
    network.model.norm.weight.data.fill_(0.0)  # all logits are equal: greedy takes the first token, 0
    assert generate_tokens(network, [256, 97], 50, end=256, temperature=0.0) == [0] * 50
    assert generate_tokens(network, [256, 97], 50, end=0, temperature=0.0) == [0]


def test_the_prompt_begins_a_document_only_where_there_are_several() -> None:
    from coterie.tasks._sampling import prompt_tokens

    alone = SimpleNamespace(several_documents=False, end=256)
    assert prompt_tokens(TOKENIZER, alone, "ab") == [97, 98]
    assert prompt_tokens(TOKENIZER, alone, None) == [10]
    assert prompt_tokens(TOKENIZER, alone, "") == [256]
    assert prompt_tokens(TOKENIZER, FACTS, "ab") == [256, 97, 98]
    assert prompt_tokens(TOKENIZER, FACTS, None) == [256]


def test_label_smoothing_only_while_training() -> None:
    network, rows = model("dcformer"), batch()
    smooth, plain = task(augment={"label_smoothing": 0.2}), task()
    assert torch.equal(smooth.loss(network, rows)["loss"], plain.loss(network, rows)["loss"])
    network.train()
    assert not torch.allclose(smooth.loss(network, rows)["loss"], plain.loss(network, rows)["loss"], rtol=1e-6)
