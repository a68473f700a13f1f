"""The authors' checkpoint folders: what is loaded, what is left out, what is refused."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from coterie.models.dcformer import config_from_authors, load_authors_checkpoint
from coterie.testing import generated_weights

SMALL = {
    "vocab_size": 13,
    "n_layer": 2,
    "n_head": 4,
    "dim": 16,
    "block_size": 32,
    "use_qk_norm": True,
    "window_size": 4,
}
PLUS = {"model_type": "dcformer", **SMALL, "intermediate_size": 24}
PYTHIA = {"model_type": "dcpythia", **SMALL, "intermediate_size": 64, "rotary_pct": 0.5}


def authors_state(settings, *, extras=True, separate=False):
    """What one of their files holds: the weights, and copies and buffers that are none."""
    n, d, width, vocab = (settings[key] for key in ("n_head", "dim", "intermediate_size", "vocab_size"))
    pythia = settings["model_type"] == "dcpythia"
    shapes = {"tok_embeddings.weight": (vocab, d), "norm.weight": (d,), "output.weight": (vocab, d)}
    for i in range(settings["n_layer"]):
        layer = f"layers.{i}"
        qkv = {f"attention.w{x}": (d, d) for x in "qkv"} if separate else {"attention.wqkv": (3 * d, d)}
        linear = {**qkv, "attention.wo": (d, d), "feed_forward.w1": (width, d), "feed_forward.w2": (d, width)}
        if not pythia:
            linear["feed_forward.w3"] = (width, d)
        for name, shape in linear.items():
            shapes[f"{layer}.{name}.weight"] = shape
            if pythia:
                shapes[f"{layer}.{name}.bias"] = shape[:1]
        shapes |= {f"{layer}.attention.{x}_norm.scale": (d // n,) for x in "qk"}
        for norm in ("attention_norm", "ffn_norm"):
            shapes |= {f"{layer}.{norm}.{kind}": (d,) for kind in (("weight", "bias") if pythia else ("weight",))}
        maps = f"{layer}.attention.dyn_w_proj"
        shapes |= {f"{maps}.dw1": (d, 1, 4, 4 * n), f"{maps}.qkw": (1, 4, 4 * n, 4, n), f"{maps}.dd": (d, 1, 4 * n)}
    if pythia:
        shapes["norm.bias"] = (d,)
    state = generated_weights(shapes.items(), dtype=torch.float32)
    for i in range(settings["n_layer"] if extras else 0):
        maps = f"layers.{i}.attention.dyn_w_proj"
        state[f"{maps}.dw_m"] = torch.cat([state[f"{maps}.dw1"].flatten(1), state[f"{maps}.dd"].squeeze(1)], dim=1)
        state[f"{maps}.qkw_m"] = state[f"{maps}.qkw"].reshape(4, 4 * n, -1).clone()
        for use in ("pre", "post"):
            state[f"{maps}.{use}_proj.w"] = torch.eye(n)
        for cache in ("k_cache", "v_cache", "kw_cache"):
            state[f"layers.{i}.attention.kv_cache.{cache}"] = torch.zeros(1, 4, 2)
    return state


def written(folder, settings, state, *, kind="safetensors", shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    names = sorted(state)
    files = {}
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        stem = "model" if kind == "safetensors" else "pytorch_model"
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{kind}"
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        files |= dict.fromkeys(part, file)
    if shards > 1:
        index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
        (folder / index).write_text(json.dumps({"weight_map": files}))
    return folder


def logits(model):
    return model(torch.arange(11).unsqueeze(0)).logits.detach()


@pytest.mark.parametrize("settings", [PLUS, PYTHIA], ids=["plus", "pythia"])
def test_every_way_a_folder_may_be_written_loads_the_same(tmp_path, settings):
    state = authors_state(settings)
    expected = logits(load_authors_checkpoint(written(tmp_path / "whole", settings, state)))
    assert expected.std() > 0.1
    for name, kind, shards in (("shards", "safetensors", 3), ("torch", "bin", 1), ("torch_shards", "bin", 2)):
        folder = written(tmp_path / name, settings, state, kind=kind, shards=shards)
        assert torch.equal(logits(load_authors_checkpoint(folder)), expected)
    bare = written(tmp_path / "bare", settings, authors_state(settings, extras=False))
    model = load_authors_checkpoint(bare)
    assert torch.equal(logits(model), expected)
    assert not model.training
    again = type(model).from_pretrained(saved(model, tmp_path / "ours"))
    torch.testing.assert_close(logits(again), expected)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_separate_projections_and_half_precision(tmp_path):
    separate = written(tmp_path / "separate", PLUS, authors_state(PLUS, separate=True))
    assert logits(load_authors_checkpoint(separate)).isfinite().all()
    half = {name: tensor.half() for name, tensor in authors_state(PLUS).items()}
    folder = written(tmp_path / "half", PLUS, half)
    assert load_authors_checkpoint(folder).dtype == torch.float16
    assert load_authors_checkpoint(folder, dtype=torch.float32).dtype == torch.float32


def test_copies_and_buffers_are_no_parameters(tmp_path):
    model = load_authors_checkpoint(written(tmp_path / "x", PLUS, authors_state(PLUS)))
    assert sum(p.numel() for p in model.parameters()) == sum(
        tensor.numel() for tensor in authors_state(PLUS, extras=False).values()
    )


def test_query_wise_checkpoints_have_no_key_maps(tmp_path):
    settings = {**PLUS, "query_wise": True}
    model = load_authors_checkpoint(written(tmp_path / "x", settings, authors_state(settings)))
    maps = model.model.layers[0].self_attn.maps
    assert maps.streams == (("pre", "query"), ("post", "query"))
    qkw = authors_state(settings)["layers.0.attention.dyn_w_proj.qkw"]
    assert torch.equal(maps.mix, qkw[0, [0, 2]])


def test_trained_copies_are_dropped_as_their_code_drops_them_but_not_silently(tmp_path):
    state = authors_state(PLUS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = logits(load_authors_checkpoint(written(tmp_path / "a", PLUS, state)))
    state["layers.1.attention.dyn_w_proj.qkw_m"] += 1
    with pytest.warns(UserWarning, match=r"layers.1.attention.dyn_w_proj.qkw_m differs from .*qkw: .* trained further"):
        model = load_authors_checkpoint(written(tmp_path / "b", PLUS, state))
    assert torch.equal(logits(model), expected)


def without(name):
    def change(folder, state):
        del state[name]
        written(folder, PLUS, state)

    return change


def with_tensor(name, tensor):
    def change(folder, state):
        written(folder, PLUS, {**state, name: tensor})

    return change


def cut_short(folder, state):
    file = next(written(folder, PLUS, state, shards=2).glob("*2-of*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def cut_short_torch(folder, state):
    file = next(written(folder, PLUS, state, kind="bin").glob("*.bin"))
    file.write_bytes(file.read_bytes()[:2000])


def garbage(folder, state):
    next(written(folder, PLUS, state).glob("*.safetensors")).write_bytes(b"\x00" * 64)


def pickled_code(folder, state):
    written(folder, PLUS, {}, kind="bin")
    torch.save({"layers": print}, next(folder.glob("*.bin")))


def lost_shard(folder, state):
    next(written(folder, PLUS, state, shards=3).glob("*2-of*.safetensors")).unlink()


def no_weights(folder, state):
    next(written(folder, PLUS, state).glob("*.safetensors")).unlink()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            without("layers.1.attention.dyn_w_proj.dd"),
            ValueError,
            "1 tensors are missing .*: model.layers.1.self_attn.maps.gate",
        ),
        (
            without("layers.0.attention.wqkv.weight"),
            ValueError,
            "3 tensors are missing .*q_proj.weight, .*k_proj.weight",
        ),
        (
            with_tensor("layers.0.attention.lora.weight", torch.ones(2)),
            ValueError,
            "lora.weight is not one of a DCFormer",
        ),
        (with_tensor("bias", torch.ones(2)), ValueError, "tensor bias is not one of a DCFormer"),
        (with_tensor("layers.7.ffn_norm.weight", torch.ones(16)), ValueError, "has no place for 1 tensors: .*layers.7"),
        (with_tensor("norm.weight", torch.ones(15)), ValueError, r"norm.weight must have shape \(16,\), got \(15,\)"),
        (
            with_tensor("layers.0.attention.wqkv.weight", torch.ones(40, 16)),
            ValueError,
            r"wqkv.weight must have 48 rows, got shape \(40, 16\)",
        ),
        (
            with_tensor("layers.0.attention.dyn_w_proj.dw1", torch.ones(16, 2, 4, 8)),
            ValueError,
            "dw1 must have 4 dimensions and one group",
        ),
        (
            with_tensor("layers.0.attention.dyn_w_proj.pre_proj.w", torch.ones(4, 4)),
            ValueError,
            "pre_proj.w is not the identity",
        ),
        (cut_short, ValueError, "2-of-00002.safetensors cannot be read; is it corrupt or cut short"),
        (cut_short_torch, ValueError, "bin cannot be read; is it corrupt or cut short"),
        (garbage, ValueError, "safetensors cannot be read; is it corrupt"),
        (pickled_code, ValueError, "bin cannot be read"),
        (
            lost_shard,
            FileNotFoundError,
            "00002-of-00003.safetensors is not there, and model.safetensors.index.json names",
        ),
        (no_weights, FileNotFoundError, "has no weights: no .safetensors, .bin, .pt or .pth file"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_damaged_checkpoints_are_refused_and_say_where(tmp_path, change, error, message):
    change(tmp_path / "x", authors_state(PLUS))
    with pytest.raises(error, match=message):
        load_authors_checkpoint(tmp_path / "x")


def test_folders_and_configurations(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_authors_checkpoint(tmp_path / "nowhere")
    folder = written(tmp_path / "x", PLUS, authors_state(PLUS))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_authors_checkpoint(folder)
    assert logits(load_authors_checkpoint(folder, config=config_from_authors(PLUS))).isfinite().all()
    with pytest.raises(ValueError, match="it has no n_layer, vocab_size"):
        config_from_authors({"n_head": 2, "dim": 8})
    with pytest.raises(ValueError, match="window_type must be null, LGLL or LGL6, got 'GG'"):
        config_from_authors({**PLUS, "window_type": "GG"})


def test_their_configuration_in_our_words():
    plus = config_from_authors({**PLUS, "window_type": "LGL6", "n_layer": 9, "mgate": True, "mgate_dim": 4})
    assert [kind == "full_attention" for kind in plus.layer_types] == [False, True, *[False] * 7]
    assert (plus.sliding_window, plus.mlp_gate_groups, plus.norm, plus.gated_mlp) == (256, 4, "rms", True)
    pythia = config_from_authors({**PYTHIA, "window_size": None})
    assert pythia.layer_types == ["full_attention"] * 2
    assert pythia.rotary_dim == 2
    assert (pythia.norm, pythia.parallel_residual, pythia.attention_bias, pythia.mlp_bias) == (
        "layer",
        True,
        True,
        True,
    )
    assert config_from_authors({**PLUS, "use_dcmha": False}).composition_uses == ()
