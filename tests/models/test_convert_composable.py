"""Plain transformers become composable ones: same outputs at first, and the maps learn."""

import copy

import pytest
import timm
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from coterie.attention import HeadMaps
from coterie.models.convert_composable import to_composable
from coterie.models.dcformer import DCFormerForCausalLM, DCFormerModel

SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama_grouped": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, rope_parameters=LLAMA3)),
    "llama_tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, head_dim=6)
    ),
    "llama_decoder": lambda: LlamaModel(LlamaConfig(**SIZES)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "neox_sequential": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SIZES, use_parallel_residual=False, attention_bias=False)
    ),
    "neox_decoder": lambda: GPTNeoXModel(GPTNeoXConfig(**SIZES)),
}


def token_ids(*shape):
    return torch.randint(0, 31, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_language_models_give_the_same_at_first(make):
    torch.manual_seed(0)
    plain = make().eval()
    for parameter in plain.parameters():  # biases too
        parameter.add_(0.05 * torch.randn_like(parameter))
    ids, mask = token_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :4] = 0
    expected = plain(ids, attention_mask=mask)[0]
    parameters = sum(p.numel() for p in plain.parameters())
    new = to_composable(plain)
    assert type(new) is (DCFormerForCausalLM if "CausalLM" in type(plain).__name__ else DCFormerModel)
    torch.testing.assert_close(new(ids, attention_mask=mask)[0][mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    assert sum(p.numel() for p in new.parameters()) == parameters + 2 * (20 * 4 * 32 + 64 * 4**2)
    assert all(p.dtype == torch.float32 and not p.is_meta for p in new.parameters())


def test_generation_and_files_are_as_before(tmp_path):
    torch.manual_seed(0)
    plain = MODELS["llama_grouped"]().eval()
    plain.generation_config.max_new_tokens = 7
    plain.generation_config.eos_token_id = None
    expected = plain.generate(token_ids(2, 6), do_sample=False)
    new = to_composable(plain)
    assert torch.equal(new.generate(token_ids(2, 6), do_sample=False), expected)
    new.save_pretrained(tmp_path)
    assert torch.equal(
        DCFormerForCausalLM.from_pretrained(tmp_path).generate(token_ids(2, 6), do_sample=False), expected
    )


@pytest.mark.parametrize("make", [MODELS["llama"], MODELS["neox"]], ids=["llama", "neox"])
def test_the_maps_learn(make):
    torch.manual_seed(0)
    model = to_composable(make().train(), static=True)
    assert model.training
    maps = [p for module in model.modules() if isinstance(module, HeadMaps) for p in module.parameters()]
    before, ids = copy.deepcopy(maps), token_ids(4, 12)
    optimizer = torch.optim.Adam(maps, lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(one, other) for one, other in zip(before, maps))


@torch.no_grad()
def test_vision_transformers_give_the_same_at_first():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    for name, extra in (("vit_tiny_patch16_224", {"qk_norm": True}), ("deit_tiny_distilled_patch16_224", {})):
        torch.manual_seed(0)
        plain = timm.create_model(name, **options, **extra).eval()
        x = torch.randn(2, 3, 32, 32)
        expected = plain(x)
        new = to_composable(plain, sides=("query",))
        assert sum(isinstance(module, HeadMaps) for module in new.modules()) == 2
        torch.testing.assert_close(new(x), expected, rtol=0, atol=1e-6)


def test_models_without_counterpart_are_refused():
    with pytest.raises(ValueError, match=r"attention_dropout has no counterpart here: set it to 0 first, got 0\.1"):
        to_composable(LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)))
    with pytest.raises(ValueError, match=r"hidden_dropout has no counterpart here: set it to 0 first, got 0\.2"):
        to_composable(GPTNeoXModel(GPTNeoXConfig(**SIZES, hidden_dropout=0.2)))
    with pytest.raises(ValueError, match="rope_type must be one of"):
        to_composable(LlamaModel(LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0})))
    for model in (BertModel(BertConfig(**SIZES)), timm.create_model("resnet18"), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"must be a Llama or GPT-NeoX of transformers .*, got"):
            to_composable(model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got str"):
        to_composable("llama")
