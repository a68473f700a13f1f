"""Sets of the Hugging Face hub, as far as that goes without a network."""

from __future__ import annotations

import datasets
import pytest

from coterie.data import open_data


@pytest.fixture
def hub(monkeypatch, picture):
    """hub(**splits) makes `load_dataset` give these splits, each a list of labels."""

    def make(column="label", **splits):
        features = datasets.Features({"img": datasets.Image(), column: datasets.ClassLabel(names=["cat", "dog"])})
        loaded = datasets.DatasetDict(
            {
                name: datasets.Dataset.from_dict(
                    {"img": [picture(seed) for seed in range(len(labels))], column: labels}, features
                )
                for name, labels in splits.items()
            }
        )
        calls = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: calls.append(arguments) or loaded)
        return calls

    return make


def test_splits_and_names_of_a_hub_set(hub, picture):
    calls = hub(train=[0, 1, 1], test=[1], unsupervised=[-1])
    source = open_data("hf:someone/pets?config=small")
    assert calls == [("someone/pets", "small")]
    assert source.name == "someone/pets"
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {"train": [0, 1, 1], "test": [1]}
    sample = source.splits["train"][2]
    assert sample.image.tobytes() == picture(2).tobytes()
    assert sample.name == "hf:someone/pets train row 2"


def test_a_shuffled_set_keeps_pictures_and_labels_together(hub, monkeypatch, picture):
    hub(train=[0, 0, 0, 1, 1, 1], test=[0, 1])
    loaded = datasets.load_dataset()
    loaded["train"] = loaded["train"].shuffle(seed=1)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    pictures = {picture(seed).tobytes(): int(seed > 2) for seed in range(6)}
    for sample in open_data("hf:pets").splits["train"]:
        assert pictures[sample.image.tobytes()] == sample.label


def test_splits_that_do_not_fit(hub):
    hub(test=[0, 1])
    with pytest.raises(ValueError, match="hf:pets: no train split; its splits are test"):
        open_data("hf:pets")
    hub(train=[0, 1], valid=[0], dev=[0])
    with pytest.raises(ValueError, match="two of its splits mean validation"):
        open_data("hf:pets")
    hub(column="kind", train=[0, 1, 0, 1], test=[0])
    assert open_data("hf:pets").classes == ["cat", "dog"]


def test_without_a_network_the_error_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"hf:nobody/nothing: cannot be loaded: .*only sets in the cache") as caught:
        open_data("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
