"""Peak memory measured in a fresh process: what is allocated outside torch counts, also when it is freed again."""

import sys
from pathlib import Path

import pytest
import torch

from coterie.bench import get_op
from coterie.bench.memory import available_bytes, measure_in_child, measure_in_process
from coterie.bench.op import memory_job

MIB = 2**20


@pytest.fixture(autouse=True)
def targets_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the marks that Linux keeps")
def test_counts_what_is_allocated_outside_torch_also_when_it_is_freed_again() -> None:
    found = measure_in_child("bench_targets:held_and_freed", {"held": 10, "freed": 60})
    # bytearray(bytes) holds the bytes and the copy for a moment, so a block of n MiB takes 2n.
    assert found["peak_extra_bytes"] == pytest.approx(2 * 60 * MIB, abs=4 * MIB)
    assert "VmHWM" in found["method"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the marks that Linux keeps")
def test_an_operation_takes_at_least_its_output() -> None:
    op = get_op("global")
    case = op.case(tokens=4096, heads=4, head_dim=64)
    job = {"module": op.make_inputs.__module__, "op": "global", "case": case.as_dict(), "contender": op.baseline.name}
    found = measure_in_child("coterie.bench.op:memory_job", {**job, "backward": False})
    output = 4096 * 4 * 64 * 4
    assert output <= found["peak_extra_bytes"] < 6 * output


def test_a_job_that_fails_leaves_the_figure_open_with_the_reason() -> None:
    found = measure_in_child("bench_targets:broken", {})
    assert found["peak_extra_bytes"] is None
    assert "no such kernel" in found["reason"]


def test_a_job_that_takes_too_long_is_stopped() -> None:
    found = measure_in_child("bench_targets:endless", {}, timeout=2.0)
    assert found["peak_extra_bytes"] is None
    assert "more than 2 s" in found["reason"]


def test_the_job_of_an_unavailable_contender_says_why() -> None:
    op = get_op("dynamic_group")
    case = op.case(tokens=128).as_dict()
    backends = op.backends(op.case(tokens=128), False)
    refused = [name for name, backend in backends.items() if isinstance(backend, str)]
    if not refused:
        pytest.skip("every backend runs on this machine")
    with pytest.raises(ValueError, match=refused[0]):
        memory_job(op.make_inputs.__module__, op.name, case, refused[0], False)


def test_torch_does_not_tell_for_the_cpu() -> None:
    found = measure_in_process(lambda: None, torch.device("cpu"))
    assert found["peak_extra_bytes"] is None
    assert "cpu" in found["reason"]


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc/meminfo")
def test_available_memory_is_plausible() -> None:
    free = available_bytes(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**50
