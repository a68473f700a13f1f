"""Cases for Triton's interpreter, run by test_dynamic_group_triton.py in a process of its own (the file name keeps
pytest from collecting it elsewhere): the flag is read when kernels are decorated, and turns every kernel of a process.

float32 only, as the interpreter's bfloat16 products are not those of a GPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.ops import explain, grouped_attention
from coterie.ops.dynamic_group import reference, triton_kernels


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

SMALL = triton_kernels.Blocks(keys=16, tile=16, warps=4, piece=32, step=16, step_warps=4)


def make(batch=1, heads=2, queries=21, keys=19, head_dim=16, value_dim=16, groups=3, selected=5):
    """Random inputs, groups of uneven size, one of them empty, different keys in each list, an output gradient."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(batch, heads, tokens, dim, generator=generator)
        for tokens, dim in ((queries, head_dim), (keys, head_dim), (keys, value_dim), (queries, value_dim))
    )
    assignment = torch.randint(0, groups, (batch, heads, queries), generator=generator)
    assignment[assignment == groups // 2] = 0
    lists = torch.rand(batch, heads, groups, keys, generator=generator).argsort(-1)[..., :selected]
    return query, key, value, assignment, lists, grad


def expected(query, key, value, assignment, selected, grad, key_mask, scale) -> tuple[Tensor, ...]:
    """Output and gradients by the definition, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (query, key, value)]
    output = reference.grouped_attention(*leaves, assignment, selected, key_mask, scale)
    return output.detach(), *torch.autograd.grad(output, leaves, grad.double())


def check(query, key, value, assignment, selected, grad, key_mask=None, scale=0.3):
    """The public function with backend 'triton' agrees with the definition in output and every gradient."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = grouped_attention(*leaves, assignment, selected, key_mask=key_mask, scale=scale, backend="triton")
    results = (output.detach(), *torch.autograd.grad(output, leaves, grad))
    for name, result, exact in zip(
        ("output", "query", "key", "value"),
        results,
        expected(query, key, value, assignment, selected, grad, key_mask, scale),
        strict=True,
    ):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, exact.float(), rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    return results


def test_is_the_kernel_that_runs():
    query, key, value, *_ = make()
    assert explain(grouped_attention, query, key, value, backend="triton").chosen == "triton"


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"heads": 1, "queries": 1, "keys": 1, "groups": 1, "selected": 1},
        {"batch": 2, "head_dim": 5, "value_dim": 19, "queries": 17, "keys": 7, "selected": 7},
        {"batch": 2, "heads": 1, "selected": 1},
        {"heads": 1, "queries": 5, "groups": 9},
    ],
    ids=["plain", "ones", "odd dims", "one key a group", "more groups than queries"],
)
def test_agrees_with_the_definition(shape):
    check(*make(**shape))


def test_many_tiles_blocks_and_pieces(monkeypatch):
    """Several tiles in a group, several blocks in a list, several pieces of a giant group for dk and dv."""
    monkeypatch.setattr(triton_kernels, "choose_blocks", lambda *_: SMALL)
    query, key, value, assignment, selected, grad = make(queries=90, keys=40, head_dim=8, value_dim=8, selected=20)
    assignment[:, 0] = torch.where(torch.arange(90) % 11 == 0, 2, 0)
    check(query, key, value, assignment, selected, grad)


@pytest.mark.parametrize("owner", [0, 2])
def test_one_group_holds_everything(owner):
    query, key, value, assignment, selected, grad = make()
    check(query, key, value, torch.full_like(assignment, owner), selected, grad)


def test_key_mask_and_a_batch_row_without_keys():
    query, key, value, assignment, selected, grad = make(batch=2, heads=1)
    key_mask = torch.arange(key.shape[2]) % 3 != 0
    key_mask = torch.stack([key_mask, torch.zeros_like(key_mask)])
    key[~key_mask[:, None].expand(key.shape[:3])] = float("nan")  # what is masked is not even looked at
    value[~key_mask[:, None].expand(value.shape[:3])] = float("inf")
    clean = [torch.nan_to_num(x, 0, 0, 0) for x in (key, value)]
    exact = expected(query, *clean, assignment, selected, grad, key_mask, 0.3)
    with torch.no_grad():
        inputs = (query, key, value, assignment, selected, key_mask)
        output, logsumexp = triton_kernels.forward(*inputs, 0.3)
        gradients = triton_kernels.backward(grad, *inputs, output, logsumexp, 0.3)
    for result, one in zip((output, *gradients), exact, strict=True):
        torch.testing.assert_close(result, one.float(), rtol=1e-5, atol=1e-5)
    assert torch.isneginf(logsumexp[1]).all()
    assert not output[1].any()
    assert torch.isfinite(logsumexp[0]).all()


def test_lists_padded_with_minus_one():
    query, key, value, assignment, selected, grad = make(heads=1, selected=4)
    padded = torch.cat([selected, torch.full_like(selected[..., :3], -1)], -1)
    with torch.no_grad():
        for lists in (selected, padded):
            inputs = (query, key, value, assignment, lists, None)
            output, logsumexp = triton_kernels.forward(*inputs, 0.3)
            results = (output, logsumexp, *triton_kernels.backward(grad, *inputs, output, logsumexp, 0.3))
            if lists is selected:
                shorter = results
    for one, other in zip(shorter, results, strict=True):
        torch.testing.assert_close(one, other)


def test_logsumexp():
    query, key, value, assignment, selected, _ = make()
    _, logsumexp = triton_kernels.forward(query, key, value, assignment, selected, None, 0.3)
    chosen = selected.gather(2, assignment.unsqueeze(-1).expand(-1, -1, -1, selected.shape[3]))
    scores = (0.3 * query @ key.transpose(-1, -2)).gather(-1, chosen)
    torch.testing.assert_close(logsumexp, scores.logsumexp(-1))


def test_any_strides():
    """(batch, tokens, heads, dim) storage, a reversed layout of the last dimension, expanded values and gradients."""
    query, key, value, assignment, selected, grad = make(batch=2)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = key.transpose(2, 3).contiguous().transpose(2, 3)
    value = value[:, :1].expand(value.shape)
    selected = selected.transpose(0, 1).contiguous().transpose(0, 1)
    assignment = assignment.repeat_interleave(2, -1)[..., ::2]
    assert not any(x.is_contiguous() for x in (query, key, value, assignment, selected))
    check(query, key, value, assignment, selected, grad[..., :1].expand(grad.shape))


def test_same_bits_every_time():
    arguments = make(heads=1)
    for first, second in zip(check(*arguments), check(*arguments), strict=True):
        assert torch.equal(first, second)
