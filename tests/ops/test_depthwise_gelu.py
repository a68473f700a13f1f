"""GELU of a depthwise convolution: the C++ kernels against torch operators in float64, output and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from coterie.ops import _cpp
from coterie.ops.depthwise_gelu import depthwise_gelu
from coterie.ops.depthwise_gelu.register import SOURCE

needs_kernels = pytest.mark.skipif(_cpp.refusal(SOURCE) is not None, reason=str(_cpp.refusal(SOURCE)))


def inputs(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dim = shape[-1]
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (dim, 1, 3, 3), (dim,), shape)]
    return [t.to(dtype) for t in made]


def results(shape, dtype, backend, scale=1.0, seed=0):
    x, weight, bias, grad = inputs(shape, dtype, seed)
    leaves = [t.requires_grad_() for t in (scale * x, weight, bias)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = depthwise_gelu(*leaves, backend=backend)
    with torch.no_grad():
        alone = depthwise_gelu(*leaves, backend=backend)
    assert torch.equal(y, alone)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@needs_kernels
@settings(max_examples=20, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 19), st.integers(1, 9), st.sampled_from([16, 48])),
    st.sampled_from([1.0, 30.0]),
)
def test_the_kernels_equal_torch_operators(shape, scale):
    exact = results(shape, torch.float64, "reference", scale)
    plain = results(shape, torch.float32, "reference", scale)
    for ours, theirs, right in zip(results(shape, torch.float32, "cpu", scale), plain, exact):
        error = (ours - right).abs().max()
        assert ours.dtype == torch.float32
        assert error <= 2 * (theirs - right).abs().max() + 2e-6 * right.abs().max() + 1e-6


@needs_kernels
def test_wide_rows_take_several_blocks_of_channels_and_threads_do_not_change_the_result():
    shape = (1, 20, 130, 160)
    exact = results(shape, torch.float64, "reference")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            once, again = results(shape, torch.float32, "cpu"), results(shape, torch.float32, "cpu")
            for one, other, right in zip(once, again, exact):
                assert torch.equal(one, other)
                torch.testing.assert_close(one, right.float(), rtol=1e-4, atol=1e-4 * float(right.abs().max()))
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_memory_layout_does_not_matter():
    x, weight, bias, _ = inputs((2, 5, 6, 32), torch.float32)
    expected = depthwise_gelu(x, weight, bias, backend="cpu")
    first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(depthwise_gelu(first, weight, bias, backend="cpu"), expected)
    apart = torch.randn(2, 5, 6, 64)[..., ::2].copy_(x)
    assert torch.equal(depthwise_gelu(apart, weight, bias, backend="cpu"), expected)


@needs_kernels
def test_torch_compile_takes_it_as_one_node_and_flops_are_counted():
    x, weight, bias, _ = inputs((1, 4, 5, 16), torch.float32)
    weight.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_gelu, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, weight, bias), depthwise_gelu(x, weight, bias, backend="cpu")
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), weight)[0])
    for backend in ("cpu", "reference"):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            depthwise_gelu(x, weight, bias, backend=backend)
        assert counter.get_total_flops() == 2 * 9 * 4 * 5 * 16


def test_auto_falls_back_to_torch_operators():
    x, weight, bias, _ = inputs((1, 3, 4, 6), torch.float32)  # six channels are no multiple of 16
    assert torch.equal(depthwise_gelu(x, weight, bias), depthwise_gelu(x, weight, bias, backend="reference"))
    half = [t.bfloat16() for t in (x, weight, bias)]
    assert depthwise_gelu(*half).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise_gelu(x.bfloat16(), weight, bias).dtype == torch.bfloat16


def test_bad_arguments():
    x, weight, bias, _ = inputs((1, 3, 4, 16), torch.float32)
    for args, error, text in [
        ((x[0], weight, bias), ValueError, r"x must have shape \(batch, height, width, dim\), got \(3, 4, 16\)"),
        (("x", weight, bias), TypeError, "x must be a torch.Tensor, got str"),
        ((x, weight[:8], bias), ValueError, "must agree in shape"),
        ((x, weight, bias[:8]), ValueError, "x and bias must agree in dim, got 16 and 8"),
        ((x, weight.double(), bias), ValueError, "x and weight must agree in dtype"),
        ((x, weight, bias.to("meta")), ValueError, "x and bias must agree in device"),
    ]:
        with pytest.raises(error, match=text):
            depthwise_gelu(*args)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        depthwise_gelu(x, weight, bias, backend="gpu")
    with pytest.raises(ValueError, match=r"it takes a multiple of 16 channels, got 8|switched off|no C\+\+ compiler"):
        depthwise_gelu(x[..., :8], weight[:8], bias[:8], backend="cpu")
