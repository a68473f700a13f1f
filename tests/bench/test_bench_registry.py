"""The register of measurable operations, its cases, and the FLOP formulas against torch's own counter."""

import subprocess
import sys
from collections.abc import Callable

import bench_ops
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coterie.bench import BenchOp, Case, get_op, list_ops
from coterie.bench.conditions import conditions, open_device


def test_known_operations() -> None:
    assert {"dynamic_group", "global"} <= set(list_ops())


def test_a_name_is_taken_once(register: Callable[[BenchOp], BenchOp]) -> None:
    register(bench_ops.make_op(bench_ops.plain))
    with pytest.raises(ValueError, match="'trial' is registered already"):
        register(bench_ops.make_op(bench_ops.plain))


def test_unknown_name_is_one_line_with_a_suggestion() -> None:
    with pytest.raises(
        ValueError, match=r"unknown operation 'dynamic_grup' \(did you mean dynamic_group\?\)"
    ) as caught:
        get_op("dynamic_grup")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"tokens": 8, "heads": 0}, "heads must be at least 1, got 0"),
        ({"tokens": 8, "head_dim": -1}, "head_dim must be at least 1, got -1"),
        ({"tokens": 8, "dtype": "int8"}, "unknown dtype 'int8'; it takes float32"),
        ({"tokens": 8, "options": {"top_k": 0}}, "top_k must be at least 1, got 0"),
        ({"tokens": 8, "options": {"groups": 1.5}}, "groups must be a whole number, got 1.5"),
        ({"tokens": 8, "options": {"window": 7}}, "has no option 'window'; it takes groups, skew, top_k"),
    ],
)
def test_wrong_sizes(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_op("dynamic_group").case(**sizes)


def test_tokens_must_be_whole() -> None:
    with pytest.raises(TypeError, match="tokens must be an int, got float"):
        Case(tokens=1.5)  # type: ignore[arg-type]


def test_options_are_completed_by_their_defaults() -> None:
    case = get_op("dynamic_group").case(tokens=8, options={"top_k": 5.0})
    assert case.options == {"groups": 48, "top_k": 5, "skew": 0.0}
    assert Case(**case.as_dict()) == case


def test_inputs_depend_on_the_seed_only() -> None:
    op = get_op("dynamic_group")
    first, again = op.make_inputs(op.case(tokens=9)), op.make_inputs(op.case(tokens=9))
    other = op.make_inputs(op.case(tokens=9, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["query"], other["query"])
    assert first["query"].shape == (1, 2, 9, 32)
    assert first["centroids"].shape == (2, 48, 32)


def test_skew_makes_groups_uneven() -> None:
    from coterie.ops import dynamic_groups

    op, largest = get_op("dynamic_group"), {}
    for skew in (0.0, 3.0):
        inputs = op.make_inputs(op.case(tokens=960, options={"skew": skew}))
        assignment, _ = dynamic_groups(inputs["query"], inputs["key"], inputs["centroids"], 1)
        largest[skew] = torch.bincount(assignment[0, 0], minlength=48).max().item()
    assert largest[3.0] > 3 * largest[0.0]


@pytest.mark.parametrize("name", ["global", "dynamic_group"])
@pytest.mark.parametrize("tokens", [50, 256])
def test_flop_formulas_are_those_of_torchs_counter(name: str, tokens: int) -> None:
    op = get_op(name)
    case = op.case(tokens=tokens, heads=3, head_dim=16, batch=2)
    inputs = op.make_inputs(case)
    available = op.backends(case, False)
    contenders = [op.baseline, available["flash" if name == "global" else op.auto(case, False)]]
    for contender in contenders:
        assert not isinstance(contender, str)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            contender.run(**inputs)
        assert contender.flops(case, False) == counter.get_total_flops()


def test_backward_costs_twice_the_attention_and_no_grouping() -> None:
    op = get_op("dynamic_group")
    case = op.case(tokens=1000)
    attention, grouping = 4 * 2 * 1000 * 32 * 98, 4 * 2 * 1000 * 32 * 48
    contender = op.backends(case, True)["native"]
    assert contender.flops(case, False) == attention + grouping  # type: ignore[union-attr]
    assert contender.flops(case, True) == 3 * attention + grouping  # type: ignore[union-attr]


def test_unavailable_backends_say_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    op = get_op("dynamic_group")
    found = op.backends(op.case(tokens=8), False)
    assert set(found) == {"reference", "native", "cpu", "triton"}
    assert isinstance(found["triton"], str) or "TRITON_INTERPRET" in __import__("os").environ
    assert op.auto(op.case(tokens=8), False) in found


@pytest.mark.parametrize(("name", "message"), [("cuda:99", "not available"), ("toaster", "unknown device 'toaster'")])
def test_wrong_devices_name_those_there_are(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*on this machine: cpu"):
        open_device(name)


def test_conditions_travel() -> None:
    found = conditions(torch.device("cpu"))
    assert found["threads"] == 1
    assert found["cpu"]
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] in torch.__version__
    )
    assert found["date"].endswith("+00:00")


def test_importing_the_bench_loads_nothing_heavy() -> None:
    heavy = ("timm", "triton", "transformers", "matplotlib", "rich", "torchvision", "accelerate")
    code = f"import sys, coterie.bench; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
