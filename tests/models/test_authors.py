"""Authors' checkpoints: every tensor used or named, or one error that names both sides and loads nothing."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from coterie.models.authors import load_authors_checkpoint, read_weights


class Net(nn.Module):
    """A model whose authors called `fc` `classifier`, and kept an index that nobody needs."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(3, classes)

    def from_authors(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        dropped = {name: "computed here" for name in state if name.endswith("index")}
        return {k.replace("classifier", "fc"): v for k, v in state.items() if k not in dropped}, dropped


STATE = {"classifier.weight": torch.ones(2, 3), "classifier.bias": torch.ones(2), "attn.index": torch.arange(4)}


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_a_file_of_torch(tmp_path: Path, wrap) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrap({f"module.{name}": tensor for name, tensor in STATE.items()}), path)
    model = Net()
    done = load_authors_checkpoint(model, path)
    assert torch.equal(model.fc.weight, torch.ones(2, 3))
    assert (done.used, done.dropped) == (2, {"attn.index": "computed here"})
    assert "2 tensors used, 1 dropped\n  dropped  attn.index: computed here" in str(done)


def test_a_file_of_safetensors(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.safetensors")
    model = Net()
    assert load_authors_checkpoint(model, tmp_path / "weights.safetensors").used == 2
    assert torch.equal(model.fc.bias, torch.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.0.weight": torch.ones(1)}, r"1 tensors have no place \(blocks.0.weight\); is it another variant's"),
        ({"classifier.bias": None}, r"1 parameters stay empty \(fc.bias\)"),
        (
            {"classifier.weight": torch.ones(5, 3)},
            r"fc.weight has shape \(5, 3\) in the file and \(2, 3\) in the model",
        ),
    ],
)
def test_another_models_file_changes_nothing(tmp_path: Path, change, message) -> None:
    state = {name: tensor for name, tensor in {**STATE, **change}.items() if tensor is not None}
    torch.save(state, tmp_path / "w.pth")
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"w.pth: not a checkpoint of this Net: .*{message}"):
        load_authors_checkpoint(model, tmp_path / "w.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Surprise:
    """Something that a weights file has no business with."""

    def __reduce__(self):
        return (print, ("never run",))


def test_files_that_are_no_checkpoint(tmp_path: Path, capsys) -> None:
    path = tmp_path / "w.pth"
    for content in (b"", b"no checkpoint at all", pickle.dumps(Surprise(), protocol=2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.pth: not a checkpoint that can be read without running its code"):
            read_weights(path)
    torch.save({"model": {"a": "text"}}, path)
    with pytest.raises(ValueError, match=r"w\.pth: holds no tensors by name"):
        read_weights(path)
    torch.save({"weights": torch.ones(300)}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"w\.pth: not a checkpoint"):
        read_weights(path)
    other = tmp_path / "w.safetensors"
    save_file(STATE, other)
    other.write_bytes(other.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"w\.safetensors: damaged or not safetensors"):
        read_weights(other)
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such file"):
        read_weights(tmp_path / "none.pth")
    assert capsys.readouterr().out == ""


def test_a_model_without_authors() -> None:
    with pytest.raises(TypeError, match="Linear has no from_authors"):
        load_authors_checkpoint(nn.Linear(2, 2), "w.pth")
