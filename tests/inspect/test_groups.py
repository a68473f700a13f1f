"""What is read out of a network is what its attention does."""

import numpy as np
import pytest
import torch
from inspect_networks import StripeNet
from torch import nn

from coterie.inspect import StageGroups, inspect_groups
from coterie.inspect.groups import by_block, explain_no_groups, interest, most_interesting


def make_head(cells: np.ndarray, groups: int, selected: np.ndarray | None = None, prefix: int = 0) -> StageGroups:
    counts = np.bincount(cells.ravel(), minlength=groups)
    chosen = selected if selected is not None else np.arange(groups * 2).reshape(groups, 2) % cells.size
    assignment = np.concatenate([np.zeros(prefix, dtype=np.int64), cells.ravel()])
    return StageGroups(0, 0, 0, cells.shape, assignment, chosen, counts, "attn", prefix)


def test_groups_of_every_stage_and_head_on_a_non_square_image() -> None:
    found = inspect_groups(StripeNet(), torch.zeros(3, 32, 48))
    assert [(h.stage, h.block, h.head, h.grid) for h in found] == [
        (0, 0, 0, (8, 12)), (0, 0, 1, (8, 12)), (1, 0, 0, (4, 6)), (1, 0, 1, (4, 6)),
    ]  # fmt: skip
    first = found[0]
    assert first.module == "stages.0.blocks.0.attn"
    assert first.label == "stage 1, block 1"
    assert first.counts.tolist() == [24, 24, 24, 24]
    # Rows 1 and 5 of 8 make group 1 in head 0 and group 2 in head 1.
    expected = list(range(12, 24)) + list(range(60, 72))
    assert first.members(1).tolist() == expected
    assert found[1].members(2).tolist() == expected
    assert first.keys(0).tolist() == [2, 1, 0]
    assert [len(heads) for heads in by_block(found)] == [2, 2]


def test_the_model_is_left_as_it_was() -> None:
    model = StripeNet().train()
    model.head.eval()
    inspect_groups(model, torch.zeros(1, 3, 32, 32))
    assert model.training
    assert model.dropout.training
    assert not model.head.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_are_removed_when_the_network_fails() -> None:
    model = StripeNet()
    with pytest.raises(RuntimeError):
        inspect_groups(model, torch.zeros(5, 32, 32))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_dgt_nano_partitions_its_tokens() -> None:
    import coterie

    torch.manual_seed(0)
    model = coterie.create_model("dgt_nano", num_classes=10).eval()
    found = inspect_groups(model, torch.randn(3, 64, 32))
    assert found
    for head in found:
        rows, columns = head.grid
        assert rows == 2 * columns
        assert head.counts.sum() == rows * columns == len(head.assignment)
        assert np.array_equal(head.counts, np.bincount(head.assignment, minlength=head.groups))
        assert head.selected.min() >= 0
        assert head.selected.max() < rows * columns
        assert all(len(set(row)) == len(row) for row in head.selected.tolist())
    assert {(h.stage, h.block) for h in found} >= {(0, 0), (1, 0)}


def test_a_vision_transformer_with_a_class_token() -> None:
    import timm

    import coterie

    model = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=2, num_classes=7)
    coterie.replace_attention(model, "dynamic_group", groups=4, top_k=6)
    found = inspect_groups(model, torch.randn(3, 64, 96))
    assert [(h.grid, h.prefix, h.block) for h in found[::3]] == [((4, 6), 1, 0), ((4, 6), 1, 1)]
    for head in found:
        assert len(head.assignment) == 25
        assert sum(len(head.members(group)) for group in range(4)) == 24
        assert all((head.keys(group) < 24).all() for group in range(4))


def test_compiled_and_wrapped_models() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    assert len(inspect_groups(Wrapper(StripeNet()), torch.zeros(3, 32, 32))) == 4


def test_a_network_without_groups_gives_nothing_and_says_why() -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert inspect_groups(model, torch.zeros(3, 32, 32)) == []
    said = explain_no_groups(model)
    assert "no dynamic groups" in said
    assert "2 × Attention" in said
    assert "replace_attention" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("cat.png", TypeError, "got str"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError, "uint8"),
        (torch.zeros(32, 32), ValueError, r"shape \(32, 32\)"),
        (torch.zeros(2, 3, 32, 32), ValueError, "one image"),
        (torch.zeros(3, 0, 32), ValueError, "one image"),
        (torch.full((3, 32, 32), float("nan")), ValueError, "NaN"),
    ],
)
def test_bad_images(image: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        inspect_groups(StripeNet(), image)  # type: ignore[arg-type]


def test_interest_prefers_groups_that_hold_together() -> None:
    cells = np.zeros((6, 6), dtype=np.int64)
    cells[:, 3:] = np.indices((6, 3)).sum(0) % 2 + 1  # group 0 a half of the image, 1 and 2 a chequerboard, 3 empty
    head = make_head(cells, 4)
    score = interest(head)
    assert score[0] > score[1] > 0
    assert score[1] == pytest.approx(score[2])
    assert score[3] == 0
    assert most_interesting(head, 10)[0] == 0
    assert sorted(most_interesting(head, 10)) == [0, 1, 2]


def test_groups_with_the_same_keys_are_less_interesting() -> None:
    cells = np.repeat(np.arange(3), 12).reshape(6, 6)
    selected = np.array([[0, 1], [1, 0], [20, 21]])
    assert most_interesting(make_head(cells, 3, selected), 2) == [0, 2]
