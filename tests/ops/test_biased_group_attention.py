"""The kernel against its definition: ragged groups, masks, biases, gradients, and what it refuses."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coterie.ops import explain
from coterie.ops.biased_group_attention import biased_group_attention

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 23, 3, 5
DOUBLE, SINGLE = (torch.float64, 1e-12), (torch.float32, 1e-5)


def groups_of(kind):
    tokens = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    if kind == "whole":
        return tokens[:20].view(4, 5)
    ragged = torch.full((5, 5), -1)
    ragged[:4] = tokens[:20].view(4, 5)
    ragged[0, 2] = ragged[2, 4] = ragged[3, :4] = -1
    return ragged  # the last group is empty


def mask_of(kind):
    if kind is None:
        return None
    mask = torch.rand(BATCH, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.4
    return torch.zeros_like(mask) if kind == "nothing" else mask


def run(backend, dtype, groups, mask, with_bias, seed=2):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM, dtype=dtype, generator=generator).requires_grad_()
    bias = torch.randn(HEADS, 5, 5, dtype=dtype, generator=generator).requires_grad_() if with_bias else None
    y = biased_group_attention(qkv, groups, bias, key_mask=mask, scale=0.7, backend=backend)
    (y * torch.randn(y.shape, dtype=dtype, generator=generator)).sum().backward()
    return y.detach(), qkv.grad, bias.grad if with_bias else torch.zeros(1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("mask", [None, "some", "nothing"])
@pytest.mark.parametrize("kind", ["whole", "ragged"])
def test_the_kernel_is_the_definition_forward_and_backward(kind, mask, with_bias):
    for dtype, tolerance in (DOUBLE, SINGLE):
        results = [run(backend, dtype, groups_of(kind), mask_of(mask), with_bias) for backend in ("cpu", "reference")]
        for got, expected in zip(*results):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_the_definition_is_softmax_attention_inside_each_group():
    groups, mask = groups_of("ragged"), mask_of("some")
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM, dtype=torch.float64, generator=generator)
    bias = torch.randn(HEADS, 5, 5, dtype=torch.float64, generator=generator)
    y = biased_group_attention(qkv, groups, bias, key_mask=mask)
    expected = torch.zeros_like(y)
    for b in range(BATCH):
        for group in groups.tolist():
            for i, query in enumerate(group):
                keys = [(j, key) for j, key in enumerate(group) if key >= 0 and mask[b, key]]
                if query < 0 or not keys:
                    continue
                for h in range(HEADS):
                    logits = [
                        qkv[b, query, 0, h] @ qkv[b, key, 1, h] * HEAD_DIM**-0.5 + bias[h, i, j] for j, key in keys
                    ]
                    weights = torch.stack(logits).softmax(0)
                    expected[b, query, h] = sum(w * qkv[b, key, 2, h] for w, (_, key) in zip(weights, keys))
    torch.testing.assert_close(y, expected)
    assert (expected == 0).all(-1).any()  # some token had nobody to attend to


def test_numbers_do_not_depend_on_threads_beyond_rounding_and_repeat_exactly():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run("cpu", torch.float32, groups_of("ragged"), mask_of("some"), True))
    finally:
        torch.set_num_threads(before)
    for one, two, again in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
        assert torch.equal(two, again)


def test_large_logits_and_large_groups():
    groups = torch.arange(130).view(1, 130)
    qkv = 50 * torch.randn(1, 130, 3, 1, 8, generator=torch.Generator().manual_seed(4))
    y = biased_group_attention(qkv, groups, backend="cpu")
    assert y.isfinite().all()
    torch.testing.assert_close(y, biased_group_attention(qkv, groups, backend="reference"), rtol=1e-3, atol=1e-3)


def test_flops_and_compilation():
    groups = groups_of("whole")
    qkv = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = biased_group_attention(qkv, groups, backend="cpu")
        assert counter.get_total_flops() == 2 * 2 * BATCH * HEADS * 4 * 5 * 5 * HEAD_DIM
        y.sum().backward()
    assert counter.get_total_flops() == 7 * 2 * BATCH * HEADS * 4 * 5 * 5 * HEAD_DIM
    torch._dynamo.reset()
    compiled = torch.compile(biased_group_attention, fullgraph=True, backend="aot_eager")
    gradient = torch.autograd.grad(compiled(qkv, groups).square().sum(), qkv)
    expected = torch.autograd.grad(biased_group_attention(qkv, groups).square().sum(), qkv)
    torch.testing.assert_close(gradient, expected)


def test_what_it_refuses():
    qkv, groups = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM), groups_of("whole")
    bias = torch.randn(HEADS, 5, 5)
    for arguments, error, text in [
        ((qkv[0], groups), ValueError, "qkv must have shape"),
        ((qkv[:, :, :2], groups), ValueError, "3 and qkv's query, key and value must agree"),
        ((qkv, groups.float()), TypeError, "groups must be int64"),
        ((qkv, groups, bias[:2]), ValueError, "must agree in shape"),
        ((qkv, groups, bias.double()), ValueError, "qkv and bias must agree in dtype"),
    ]:
        with pytest.raises(error, match=text):
            biased_group_attention(*arguments)
    for wrong in (groups + 10, groups.clamp(max=3)):
        with pytest.raises(ValueError, match="hold each token, 0 to 22, once at most"):
            biased_group_attention(qkv, wrong, backend="cpu")
    with pytest.raises(ValueError, match="it takes float32 and float64"):
        biased_group_attention(qkv.bfloat16(), groups, backend="cpu")
    assert biased_group_attention(qkv.bfloat16(), groups).dtype == torch.bfloat16
    assert "runs: C++ kernel" in str(explain("biased_group_attention", qkv, groups))
