"""Parameters and arithmetic of the paper's three sizes, to the unit, and of the small ones."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from coterie.models import create_model

PLAIN = {"dgt_tiny": 24_094_952, "dgt_small": 51_766_248, "dgt_base": 90_281_704}
COSINE = {"dgt_tiny": 178, "dgt_small": 267, "dgt_base": 356}  # one temperature per head and block
GMACS = {"dgt_tiny": 4.328, "dgt_small": 9.381, "dgt_base": 16.361}


def _parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_parameters_with_and_without_cosine_attention(name):
    assert _parameters(create_model(name, similarity="dot", device="meta")) == PLAIN[name]
    assert _parameters(create_model(name, similarity="cosine", device="meta")) == PLAIN[name] + COSINE[name]


@pytest.mark.parametrize(("name", "cosine"), [("dgt_tiny", False), ("dgt_small", True), ("dgt_base", True)])
def test_tiny_is_pre_norm_with_dot_products_and_the_others_post_norm_with_cosines(name, cosine):
    model = create_model(name, device="meta")
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert [len(stage.blocks) for stage in model.stages] == [1, 2, 17, 2]
    assert all(block.post_norm == cosine for block in blocks)
    assert all(block.attn.similarity == ("cosine" if cosine else "dot") for block in blocks)
    assert _parameters(model) == PLAIN[name] + cosine * COSINE[name]


def test_the_last_stage_attends_globally_and_the_others_by_48_groups_of_98_keys():
    model = create_model("dgt_tiny", device="meta")
    kinds = [{type(block.attn).__name__ for block in stage.blocks} for stage in model.stages]
    assert kinds == [{"DynamicGroupAttention"}] * 3 + [{"GlobalAttention"}]
    attention = model.stages[2].blocks[0].attn
    assert (attention.groups, attention.top_k, attention.num_heads, attention.head_dim) == (48, 98, 8, 32)
    assert attention.centroids.shape == (8, 48, 32)


def test_small_ones_are_small():
    assert 1e6 < _parameters(create_model("dgt_nano", num_classes=10, device="meta")) < 2e6
    assert _parameters(create_model("dgt_pico", num_classes=10, device="meta")) < 5e5


@pytest.mark.parametrize("attention", ["dynamic_group", "global", "shifted_window", "cross_shaped_window"])
def test_every_attention_has_the_same_parameters(attention):
    model = create_model("dgt_nano", attention=attention, device="meta")
    assert _parameters(model) == _parameters(create_model("dgt_nano", device="meta"))


@pytest.mark.parametrize("name", GMACS)
def test_multiply_adds_at_224(name):
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        pytest.skip("the FLOP counter of this torch does not count attention on the CPU")
    with FakeTensorMode():
        model = create_model(name).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(GMACS[name], abs=5e-4)


def test_multiply_adds_of_the_pieces_by_hand():
    """Attention 2 k L C and grouping 2 L G C in stages 1 to 3, 2 L^2 C in the last."""
    depths = (1, 1, 1, 2)
    with FakeTensorMode():
        model = create_model("dgt_tiny", depths=depths).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(2, 3, 224, 224))
    counts = {str(op): flops / 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    tokens, dims = (3136, 784, 196, 49), (64, 128, 256, 512)
    by_groups = sum(length * dim * depth for length, dim, depth in zip(tokens[:3], dims, depths))
    assert counts["coterie.dynamic_groups"] == 2 * (2 * 48 * by_groups)
    assert counts["coterie.grouped_attention"] == 2 * (2 * 98 * by_groups)
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry:
        return  # the FLOP counter of this torch does not count attention on the CPU
    last = sum(flops for op, flops in counts.items() if "scaled_dot_product" in op)
    assert last == 2 * (2 * 49**2 * 512 * 2)
