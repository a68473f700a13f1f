"""`bench_model` on timm's tiny test models and ours."""

import json

import pytest
import timm
import torch
from torch import nn

from coterie.bench import ModelCase, Settings, bench_model
from coterie.bench import model as model_module
from coterie.bench.model import make_images, make_model, parse_model
from coterie.bench.record import case_label, failed


def test_report(quick: Settings) -> None:
    names = ["test_resnet", "test_vit"]
    report = bench_model(names, [ModelCase(size=64, batch=2)], settings=quick, measure_memory=False)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["baseline"] == "test_vit"
    (result,) = report["results"]
    assert result["order"] == names * 2
    assert result["direction"] == "forward"
    resnet, vit = result["contenders"]
    assert resnet["ratio"] == pytest.approx(vit["seconds"]["median"] / resnet["seconds"]["median"])
    assert vit["ratio"] == 1.0
    assert vit["parameters"] == sum(p.numel() for p in timm.create_model("test_vit", img_size=64).parameters())
    assert resnet["images_per_second"] == pytest.approx(2 / resnet["seconds"]["median"])
    assert resnet["macs_per_image"] == resnet["flops"] / 4  # two images, two FLOPs per multiply-add


def test_training_costs_three_times_the_arithmetic(quick: Settings) -> None:
    case = ModelCase(size=32, batch=2, train=True)
    report = bench_model(["test_vit", "test_vit2"], [case], baseline="test_vit", settings=quick, measure_memory=False)
    assert report["baseline"] == "test_vit"
    for entry in report["results"][0]["contenders"]:
        forward = 2 * entry["macs_per_image"] * case.batch
        assert entry["flops"] == 3 * forward


def test_one_backbone_with_two_mechanisms(quick: Settings) -> None:
    names = ["dgt_nano", "dgt_nano,attention=global"]
    report = bench_model(names, [ModelCase(size=32)], settings=quick, measure_memory=False)
    ours, exact = report["results"][0]["contenders"]
    assert ours["parameters"] == exact["parameters"]
    assert "ratio" in ours


def test_memory_of_a_model_is_measured_in_a_process_of_its_own(quick: Settings) -> None:
    report = bench_model(["test_resnet"], [ModelCase(size=64)], settings=quick)
    memory = report["results"][0]["contenders"][0]["memory"]
    assert memory["peak_extra_bytes"] is None or memory["peak_extra_bytes"] > 0
    assert memory["method"] or memory["reason"]


def test_options_behind_commas() -> None:
    assert parse_model("test_vit,num_classes=7,global_pool=avg") == (
        "test_vit",
        {"num_classes": 7, "global_pool": "avg"},
    )
    assert make_model("test_vit,num_classes=7", ModelCase(size=32)).num_classes == 7


def test_images_follow_model_and_case() -> None:
    case = ModelCase(size=32, batch=2, dtype="bfloat16", channels_last=True)
    model = make_model("test_resnet,in_chans=1", case)
    images = make_images(model, case)
    assert images.shape == (2, 1, 32, 32)
    assert images.dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.bfloat16
    assert make_images(make_model("test_resnet", case), case).is_contiguous(memory_format=torch.channels_last)


class Broken(nn.Module):
    """Gives what no classifier gives."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5))
        self.answer = answer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = images.mean((2, 3)) @ self.weight
        if self.answer == "raise":
            raise RuntimeError("kernel size can't be greater than input size")
        return scores * float("nan") if self.answer == "nan" else scores[0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("nan", "holds NaN or infinity"),
        ("shape", r"shape \(5,\), not \(batch, classes\)"),
        ("raise", "failed: RuntimeError"),
    ],
)
def test_a_wrong_output_gets_no_time(
    answer: str, message: str, quick: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "make_model", lambda spec, case: Broken(answer))
    report = bench_model(["test_vit"], [ModelCase(size=32)], settings=quick, measure_memory=False)
    assert "seconds" not in report["results"][0]["contenders"][0]
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(failed(report)[0])


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["swin_tiny_patch4_window7"], {}, r"unknown model .*did you mean swin_tiny_patch4_window7_224"),
        (["test_vit", "test_vit"], {}, "each model may be named once"),
        (["test_vit"], {"baseline": "test_resnet"}, "baseline 'test_resnet' is none of the models measured: test_vit"),
        (["test_vit,7"], {}, "'7' is not key=value"),
        (["test_vit,patch=7"], {}, "unexpected keyword argument 'patch'"),
        ([], {}, "at least one model"),
    ],
)
def test_wrong_names(names: list[str], changes: dict, message: str, quick: Settings) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        bench_model(names, [ModelCase(size=32)], settings=quick, measure_memory=False, **changes)
    assert "\n" not in str(caught.value)


def test_an_image_size_that_does_not_fit(quick: Settings) -> None:
    with pytest.raises(ValueError, match="'test_vit' does not take 17 pixels"):
        bench_model(["test_vit"], [ModelCase(size=17)], settings=quick, measure_memory=False)


def test_images_need_not_be_square(quick: Settings) -> None:
    case = ModelCase(size=(32, 64))
    assert make_images(make_model("test_resnet", case), case).shape == (1, 3, 32, 64)
    report = bench_model(["test_resnet", "test_vit"], [case], settings=quick, measure_memory=False)
    assert case_label(report["results"][0]) == "32x64 pixels, forward"
    assert json.loads(json.dumps(report))["results"][0]["case"]["size"] == [32, 64]


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"size": (32, 0)}, {"batch": 0}, {"dtype": "int8"}, {"device": "toaster"}]
)
def test_wrong_cases(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"at least 1|unknown"):
        ModelCase(**wrong)


def test_a_compiled_model_must_give_what_the_plain_one_gives() -> None:
    case = ModelCase(size=32, batch=2, compile=True)
    model = make_model("test_vit", case)
    images = make_images(model, case)
    weights = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        output = model(images)
    assert model_module._check_compiled(model, images, lambda: output, case) is None
    message = model_module._check_compiled(model, images, lambda: output * 1.001, case)
    assert message is not None
    assert "wrong result, not timed: compiled output: error" in message
    assert all(torch.equal(before, after) for before, after in zip(weights, model.parameters()))
