"""Batches of tensors and lists: moved, chosen and split without looking at what is in them."""

import torch

from coterie.engine.batches import rows, select, split, to_device


def make(count: int) -> dict:
    return {
        "image": torch.arange(count * 3.0).view(count, 3),
        "index": torch.arange(count),
        "truth": [
            {"boxes": torch.full((number, 4), float(number)), "masks": [b"rle"] * number} for number in range(count)
        ],
        "instances": [torch.full((number,), number) for number in range(count)],
    }


def test_parts_together_are_the_batch_in_its_order() -> None:
    batch = make(7)
    parts = split(batch, 3)
    assert [rows(part) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([part["image"] for part in parts]), batch["image"])
    assert [len(entry["boxes"]) for part in parts for entry in part["truth"]] == list(range(7))
    assert [len(part["instances"]) for part in parts] == [3, 2, 2]


def test_more_parts_than_rows_give_no_empty_part() -> None:
    assert [rows(part) for part in split(make(2), 5)] == [1, 1]


def test_selecting_rows_keeps_lists_in_step_with_tensors() -> None:
    chosen = select(make(5), torch.tensor([True, False, True, False, True]))
    assert chosen["index"].tolist() == [0, 2, 4]
    assert [len(entry["masks"]) for entry in chosen["truth"]] == [0, 2, 4]
    assert [len(entry) for entry in chosen["instances"]] == [0, 2, 4]


def test_every_tensor_moves_wherever_it_is() -> None:
    moved = to_device(make(3), torch.device("meta"))
    tensors = [moved["image"], moved["index"], *moved["instances"], *(entry["boxes"] for entry in moved["truth"])]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved["truth"][2]["masks"] == [b"rle", b"rle"]
