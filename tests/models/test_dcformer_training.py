"""DCFormer in training: checkpointing, Trainer, LoRA, compile, bf16, files."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_dcformer import CONFIGS, PLUS, small_dcformer, token_ids
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "hidden", "gate"]  # the last two make the maps


@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_gradient_checkpointing_changes_nothing(settings):
    ids = token_ids(2, 9)
    gradients = []
    for checkpointing in (False, True):
        model = small_dcformer(settings).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_it_is_the_same(tmp_path, tied):
    for settings in CONFIGS.values():
        model, ids = small_dcformer(settings, tie_word_embeddings=tied), token_ids(2, 9)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-12, atol=1e-12)
        for name, parameter in model.named_parameters():
            assert torch.equal(loaded.get_parameter(name), parameter)
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied


def test_bfloat16_computes_as_well_as_its_weights_are(tmp_path):
    model, ids = small_dcformer(dtype=torch.float32), token_ids(2, 30)
    expected = model(ids).logits.detach()

    def error(model):
        return float((model(ids).logits.detach().float() - expected).abs().mean() / expected.abs().mean())

    rounded = error(copy.deepcopy(model).bfloat16().float())  # weights in bf16, arithmetic in float32
    assert 0 < rounded < 2 * error(copy.deepcopy(model).bfloat16()) < 4 * rounded
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error(model) < 2 * rounded
    small_dcformer().save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    out = half(ids, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())
    steps = half.generate(ids[:, :12], max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert steps.shape == (2, 16)


def test_lora_on_its_projections_trains_only_the_adapters():
    base, ids = small_dcformer(), token_ids(2, 9)
    before = base(ids).logits.detach()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=PROJECTIONS))
    torch.testing.assert_close(model(ids).logits, before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(PROJECTIONS) * 3
    assert all("lora_" in name for name in trained)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, model(ids).logits)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, eos_token_id=-1).shape == (2, 12)


def test_it_compiles_in_one_graph_with_gradients():
    torch._dynamo.reset()
    model, ids = small_dcformer(dtype=torch.float32), token_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(ids, labels=ids, use_cache=False)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


class Counting(Dataset):
    """Rows that count upwards: the next token follows from the last."""

    def __len__(self):
        return 32

    def __getitem__(self, i):
        ids = torch.arange(i, i + 12) % 28 + 1
        return {"input_ids": ids, "labels": ids}


def test_trainer_trains_resumes_and_saves(tmp_path):
    def trainer(steps):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=8, learning_rate=0.01, logging_steps=4,
            save_steps=8, use_cpu=True, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        model = small_dcformer({**PLUS, "initializer_range": 0.05}, dtype=torch.float32)
        return Trainer(model, arguments, train_dataset=Counting())

    first = trainer(8)
    first.train()
    resumed = trainer(24)
    resumed.train(resume_from_checkpoint=True)
    losses = [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < 0.6 * losses[0]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-24")
    ids = Counting()[3]["input_ids"].unsqueeze(0)
    torch.testing.assert_close(saved(ids).logits, resumed.model.eval()(ids).logits)
