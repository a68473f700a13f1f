"""DCFormer: sizes, configuration, what goes in and what is refused."""

import subprocess
import sys

import pytest
import torch
from small_dcformer import CONFIGS, PLUS, small_dcformer, token_ids
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from coterie.models.dcformer import PRESETS, DCFormerConfig, DCFormerForCausalLM, DCFormerModel


@pytest.mark.parametrize(
    ("preset", "parameters", "of_maps"),
    [
        ("dcformer_405m", 419_516_416, 8_257_536),
        ("dcformer_2.8b", 2_849_567_232, 54_525_952),
        ("dcpythia_6.9b", 6_941_859_840, 85_983_232),
        ("dcformer_8b", 7_926_857_728, 128_974_848),
    ],
)
def test_published_sizes(preset, parameters, of_maps):
    with torch.device("meta"):
        model = DCFormerForCausalLM(DCFormerConfig(**PRESETS[preset]))
    counts = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(counts.values()) == parameters
    assert sum(n for name, n in counts.items() if ".maps." in name) == of_maps
    assert set(PRESETS) == {"dcformer_405m", "dcformer_2.8b", "dcpythia_6.9b", "dcformer_8b"}


def test_layers_alternate_as_published():
    def windows(preset):
        kinds = DCFormerConfig(**PRESETS[preset]).layer_types
        return "".join("L" if kind == "sliding_attention" else "G" for kind in kinds[:8])

    assert [windows(p) for p in ("dcformer_405m", "dcpythia_6.9b", "dcformer_8b")] == ["LG" * 4, "LG" * 4, "LGLL" * 2]


def test_auto_classes_know_it_only_after_the_import():
    config = AutoConfig.for_model("dcformer", **PLUS)
    assert type(config) is DCFormerConfig
    assert type(AutoModel.from_config(config)) is DCFormerModel
    assert type(AutoModelForCausalLM.from_config(config)) is DCFormerForCausalLM
    code = "import sys, coterie, coterie.models; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_configuration_survives_a_file(tmp_path):
    for settings in CONFIGS.values():
        config = DCFormerConfig(**settings)
        config.save_pretrained(tmp_path)
        assert DCFormerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"sliding_window": None}, "sliding_window must be given where there are local layers"),
        ({"layer_pattern": "LX"}, "layer_pattern must be of the letters L .local. and G .global., got 'LX'"),
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types must be out of sliding_attention, full_attention"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads, got 3 and 4"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size .* and hidden_size=32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"mlp_gate_groups": 7}, "mlp_gate_groups must divide intermediate_size, got 7 and 40"),
        ({"norm": "batch"}, "norm must be 'rms' or 'layer', got 'batch'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type must be one of default, .* 'dynamic'",
        ),
        ({"head_dim": 5}, "the channels that rotate must be even and at least 2, got 5 of head_dim=5"),
        ({"composition_rank": 0}, "composition_rank must be at least 1, got 0"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        DCFormerConfig(**{**PLUS, **settings})


def test_maps_start_as_published_and_matrices_at_their_range():
    torch.manual_seed(0)
    config = DCFormerConfig(**{**PLUS, "hidden_size": 256, "num_attention_heads": 16, "initializer_range": 0.006})
    model = DCFormerForCausalLM(config)
    maps = model.model.layers[0].self_attn.maps
    for parameter, std in [
        *maps.initial_stds(),
        (model.lm_head.weight, 0.006),
        (model.model.embed_tokens.weight, 0.006),
    ]:
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.1)
    logits = model(token_ids(1, 12)).logits.detach()
    for module in (layer.self_attn.maps for layer in model.model.layers):
        module.set_identity()
    plain = model(token_ids(1, 12)).logits.detach()
    assert 0 < float((logits - plain).abs().max() / plain.abs().max()) < 0.05


@pytest.mark.parametrize(
    "different",
    [
        {"composition_uses": []},
        {"composition_sides": ["query"]},
        {"composition_uses": ["post"]},
        {"composition_rank": 1},
    ],
)
def test_ablations_have_fewer_parameters_and_run(different):
    model = small_dcformer(**different)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in small_dcformer().parameters())
    ids = token_ids(2, 9)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_is_next_token_cross_entropy():
    model, ids = small_dcformer(), token_ids(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=0)  # transformers takes it in float32


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_eager_gives_the_same_and_the_composed_weights(settings):
    model, ids = small_dcformer(settings), token_ids(2, 9)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(out.logits, expected)
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 9, 9)] * 3
    assert len(out.hidden_states) == 4
    past_window = torch.ones(9, 9, dtype=torch.bool).tril(-5)
    assert out.attentions[0][..., past_window].abs().sum() == 0  # local
    assert out.attentions[1][..., past_window].abs().sum() > 0  # global


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_ids": torch.tensor([[1, 29]])}, "input_ids must be from 0 to 28, the vocabulary, got 1 to 29"),
        ({"input_ids": torch.tensor([[-1, 2]])}, "got -1 to 2"),
        ({"input_ids": token_ids(1, 65)}, "the sequence has 65 tokens, and max_position_embeddings is 64"),
        (
            {"input_ids": token_ids(1, 3), "position_ids": torch.tensor([[62, 63, 64]])},
            "the sequence has 65 tokens, and max_position_embeddings is 64",
        ),
        ({}, "give either input_ids or inputs_embeds"),
        (
            {"input_ids": token_ids(2, 3), "attention_mask": torch.zeros(2, 3, dtype=torch.long)},
            r"attention_mask leaves no token: all 6 of the \(2, 3\) are padding",
        ),
        (
            {"input_ids": token_ids(2, 3), "attention_mask": torch.ones(2, 4)},
            r"attention_mask must have shape \(batch, tokens seen and new\) = \(2, 3\), .* got \(2, 4\)",
        ),
        (
            {"input_ids": token_ids(2, 3), "attention_mask": torch.ones(2, 4, 3, 3)},
            r"must be \(batch, 1, queries, keys\), the same for all heads, .* got \(2, 4, 3, 3\)",
        ),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_dcformer()(**kwargs)
