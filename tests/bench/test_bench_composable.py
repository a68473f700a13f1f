"""The entry `composable`: its check, its gradients, its formulas, and the scaling over windows."""

import pytest
import torch

from coterie.bench import Settings, bench_op, bench_scaling, get_op
from coterie.bench.mechanisms.composable import causal_flops, composable_flops
from coterie.bench.verify import backward_call, check_backward, check_forward
from coterie.ops.composable.reference import allowed_pairs

OPTIONS = [{}, {"rank": 3, "static": 1}, {"window": 7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["native", "cpu"])
def test_backends_pass_the_check(options: dict, backend: str) -> None:
    op = get_op("composable")
    case = op.case(tokens=45, heads=3, head_dim=20, batch=2, options=options)
    contender = op.backends(case, True)[backend]
    if isinstance(contender, str):
        pytest.skip(contender)
    for who in (op.baseline, contender):
        for check in (check_forward(op, case, who, op.make_inputs(case)), check_backward(op, case, who)):
            assert check.passed, f"{who.name}: {check}"


def test_the_check_sees_a_map_that_is_not_used() -> None:
    op = get_op("composable")
    case = op.case(tokens=30)
    contender = op.backends(case, False)["native"]
    assert not isinstance(contender, str)
    inputs = op.make_inputs(case)
    inputs["post_key_gate"] = torch.zeros_like(inputs["post_key_gate"])
    exact = op.oracles["composable attention"](case, op.make_inputs(case), torch.arange(30))
    assert (contender.run(**inputs) - exact).abs().max() > 1e-2


def test_gradients_are_of_the_maps_too_where_they_are_read() -> None:
    op = get_op("composable")
    case = op.case(tokens=12)
    inputs = op.make_inputs(case)
    ours = op.backends(case, True)["native"]
    assert not isinstance(ours, str)
    assert len(inputs) == 3 + 12  # no static maps unless asked for
    assert [x.shape for x in backward_call(op, ours, inputs)()] == [x.shape for x in inputs.values()]
    assert len(backward_call(op, op.baseline, inputs)()) == 3


@pytest.mark.parametrize("window", [0, 5, 100])
def test_only_pairs_that_count_are_counted(window: int) -> None:
    case = get_op("composable").case(tokens=30, batch=2, heads=3, head_dim=8, options={"window": window})
    pairs = int(allowed_pairs(30, 30, True, window or None, None, torch.device("cpu")).sum())
    assert causal_flops(case, False) == 4 * 2 * 3 * 8 * 465
    assert composable_flops(case, False) == 2 * 2 * 3 * pairs * (2 * 8 + 2 * 10)
    assert composable_flops(case, True) == 3 * composable_flops(case, False)


def test_report_and_scaling(quick: Settings) -> None:
    op = get_op("composable")
    cases = [op.case(tokens=tokens, head_dim=8) for tokens in (16, 32)]
    directions = ["forward", "forward+backward"]
    report = bench_op(
        op.name, cases[:1], backends=["native"], directions=directions, settings=quick, measure_memory=False
    )
    for result in report["results"]:
        assert [entry["check"]["passed"] for entry in result["contenders"]] == [True, True]
    grown = bench_scaling(op.name, cases, backends=["native"], settings=quick, measure_memory=False)["growth"]
    assert set(grown) == {"scaled_dot_product_attention", "native"}
    assert all(slope["time"] is not None for slope in grown.values())
