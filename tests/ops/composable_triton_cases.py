"""Cases for Triton's interpreter, run by test_composable_triton.py in a process of its own (the file name keeps pytest
from collecting it elsewhere): the flag is read when kernels are decorated, and turns every kernel of a process.

float32 only, as the interpreter's bfloat16 products are not those of a GPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
import triton.language as tl
from composable_inputs import changed, inputs, results

from coterie.ops import HeadComposition, composable_attention, explain
from coterie.ops.composable import triton_kernels


@triton.jit
def _count(x, n):
    for i in range(0, n):
        tl.store(x + i, i)


def _interpreter_failure() -> str | None:
    """Triton before 3.7 cannot loop to a run-time bound under NumPy 2.4 or newer."""
    try:
        _count[(1,)](torch.zeros(2), 2)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter does not run here: {error}"
    return None


if reason := _interpreter_failure():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def check(arguments, **options):
    """The public function with backend 'triton' agrees with the definition in float64, in output and every gradient."""
    want = results(changed(arguments, torch.Tensor.double), **options, backend="reference")
    got = results(arguments, **options, backend="triton")
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y.float(), rtol=1e-5, atol=2e-5, msg=lambda m, i=i: f"{i}: {m}")
    return got


DYNAMIC = HeadComposition._fields[:-1]  # a static map is a product over at least 16 heads, slow here


def make(batch=1, heads=2, queries=21, parts=DYNAMIC, **sizes):
    return inputs(batch, heads, queries, dtype=torch.float32, parts=parts, **sizes)


def test_is_the_kernel_that_runs():
    arguments = make()
    assert explain(composable_attention, *arguments).chosen == "triton"
    many = [x.detach().repeat_interleave(40, 1) for x in arguments[:3]]
    assert "up to 64 heads" in dict(explain(composable_attention, *many, None, None).reasons)["triton"]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"parts": HeadComposition._fields}, {}),
        ({"heads": 1, "queries": 1, "dim": 1}, {"is_causal": True, "window": 1}),
        ({"batch": 2, "heads": 3, "keys": 40, "dim": 5, "value_dim": 19}, {"is_causal": True}),
        ({"heads": 4, "kv_heads": 2, "queries": 35, "rank": 1, "key_rank": 3}, {"is_causal": True, "window": 9}),
        ({"queries": 40, "keys": 30}, {"window": 12}),
        ({"queries": 30, "keys": 20}, {"is_causal": True}),
    ],
    ids=["plain", "ones", "odd dims, cross", "shared keys, ranks, window", "two-sided window", "queries without keys"],
)
def test_agrees_with_the_definition(shape, options):
    check(make(**shape), **options)


@pytest.mark.parametrize(
    "parts",
    [(), ("query_gate",), ("key_gate",), ("query_in", "query_out"), ("key_in", "key_out"), ("static",)],
    ids=lambda parts: parts[0] if parts else "none",
)
def test_parts_may_be_missing(parts):
    check(make(queries=10, parts=parts), is_causal=True)


def test_masks_and_a_batch_row_without_keys():
    arguments = make(batch=2)
    mask = torch.rand(2, 1, 21, 21) > 0.4
    mask[1] = False
    output = check(arguments, attn_mask=mask, is_causal=True)[0]
    assert not output[1].any()
    check(arguments, attn_mask=torch.rand(2, 1, 1, 21) > 0.4)


def test_slices_of_wide_heads(monkeypatch):
    small = triton_kernels.Blocks(heads=2, queries=16, keys=16, step=16, slice=16, warps=4)
    monkeypatch.setattr(triton_kernels, "choose_blocks", lambda *_: small)
    check(make(queries=20, dim=40, value_dim=24, parts=["query_in", "query_out", "key_gate"]), is_causal=True)


def test_any_strides():
    query, key, value, pre, post = make()
    query, key = (x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key))
    value = value.detach().mT.contiguous().mT.requires_grad_()
    check((query, key, value, pre, post), attn_mask=(torch.rand(21, 21) > 0.3).t())


def test_same_bits_every_time():
    arguments = make()
    first, second = (results(arguments, is_causal=True, backend="triton") for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
