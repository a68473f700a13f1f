"""The fused middle of an inverted residual feed-forward against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie import ops


def inputs(*shape, dtype=torch.float32):
    dim = shape[3]
    parts = (torch.randn(dim), torch.randn(dim), torch.randn(dim, 1, 3, 3), torch.randn(dim))
    return [t.to(dtype) for t in (2 * torch.randn(shape), *parts)]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)),
    seed=st.integers(0, 2**16),
    contiguous=st.booleans(),
)
def test_kernel_is_as_exact_as_plain_torch(sizes, seed, contiguous):
    torch.manual_seed(seed)
    arguments = inputs(*sizes[:3], 16 * sizes[3])
    if not contiguous:
        arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    offset = torch.randn(16 * sizes[3]) if seed % 2 else None
    wide = None if offset is None else offset.double()
    exact = ops.gelu_depthwise(*(t.double() for t in arguments), offset=wide, backend="reference")
    plain = ops.gelu_depthwise(*arguments, offset=offset, backend="reference")
    fused = ops.gelu_depthwise(*arguments, offset=offset, backend="cpu")
    budget = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1)
    assert (fused - exact).abs().max() <= budget


def test_wide_rows_and_many_channels():
    """Rows wider than the buffer's channel block, so that blocks of channels take turns."""
    torch.manual_seed(0)
    arguments = inputs(1, 35, 700, 48)
    want = ops.gelu_depthwise(*arguments, backend="reference")
    torch.testing.assert_close(ops.gelu_depthwise(*arguments, backend="cpu"), want, rtol=1e-5, atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 12)] * 3, st.integers(1, 5)), seed=st.integers(0, 2**16))
def test_gelu_affine_is_as_exact_as_plain_torch(sizes, seed):
    torch.manual_seed(seed)
    x, scale, shift, *_ = inputs(*sizes[:3], 16 * sizes[3])
    exact = ops.gelu_affine(x.double(), scale.double(), shift.double())
    plain = ops.gelu_affine(x, scale, shift, backend="reference")
    fused = ops.gelu_affine(x.transpose(1, 2), scale, shift, backend="cpu").transpose(1, 2)
    budget = 2 * (plain - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max().clamp_min(1)
    assert (fused - exact).abs().max() <= budget


def test_gelu_affine_is_well_formed_and_names_wrong_arguments():
    x, scale, shift, *_ = inputs(2, 3, 4, 16)
    torch.library.opcheck(
        torch.ops.coterie.gelu_affine, (x, scale, shift), test_utils=("test_schema", "test_faketensor")
    )
    with pytest.raises(ValueError, match="x and shift must agree in dim, got 16 and 8"):
        ops.gelu_affine(x, scale, torch.randn(8))
    scale.requires_grad_()
    ops.gelu_affine(x, scale, shift).sum().backward()
    torch.testing.assert_close(scale.grad, torch.nn.functional.gelu(x).sum((0, 1, 2)))


def test_the_offset_is_a_bias_of_the_input():
    torch.manual_seed(0)
    x, *rest = inputs(1, 4, 5, 16)
    offset = torch.randn(16)
    for backend in ("cpu", "reference"):
        want = ops.gelu_depthwise(x + offset, *rest, backend=backend)
        torch.testing.assert_close(ops.gelu_depthwise(x, *rest, offset=offset, backend=backend), want)
    with pytest.raises(ValueError, match="x and offset must agree in dim, got 16 and 8"):
        ops.gelu_depthwise(x, *rest, offset=torch.randn(8))


def test_extreme_values_stay_finite_and_right():
    arguments = [torch.tensor([-1e30, -20.0, -5.0, 0.0, 5.0, 20.0, 1e30, 3.0]).repeat(2).view(1, 1, 1, 16)]
    arguments += [torch.ones(16), torch.zeros(16), torch.zeros(16, 1, 3, 3), torch.zeros(16)]
    want = ops.gelu_depthwise(*arguments, backend="reference")
    torch.testing.assert_close(ops.gelu_depthwise(*arguments, backend="cpu"), want, rtol=1e-6, atol=1e-6)


def test_a_gradient_or_another_dtype_takes_the_reference():
    arguments = inputs(1, 3, 3, 16)
    assert ops.explain("gelu_depthwise", *arguments).chosen == "cpu"
    assert ops.explain("gelu_depthwise", *(t.double() for t in arguments)).chosen == "reference"
    arguments[3].requires_grad_()
    assert ops.explain("gelu_depthwise", *arguments).chosen == "reference"
    ops.gelu_depthwise(*arguments).sum().backward()
    assert arguments[3].grad is not None
    with pytest.raises(ops.BackendUnavailable, match="it has no gradient, and one is needed"):
        ops.gelu_depthwise(*arguments, backend="cpu")


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.randn(3, 3, 16), "x must have shape"),
        (1, torch.randn(8), "x and scale must agree in dim, got 16 and 8"),
        (3, torch.randn(16, 1, 5, 5), "weight must agree in shape"),
        (4, torch.randn(16).double(), "x and bias must agree in dtype"),
    ],
)
def test_wrong_arguments_are_named(index, value, message):
    arguments = inputs(1, 3, 3, 16)
    arguments[index] = value
    with pytest.raises(ValueError, match=message):
        ops.gelu_depthwise(*arguments)


def test_operator_is_well_formed_compiles_and_counts():
    from torch.utils.flop_counter import FlopCounterMode

    arguments = inputs(2, 5, 7, 32)
    torch.library.opcheck(
        torch.ops.coterie.gelu_depthwise,
        (arguments[0], torch.randn(32), *arguments[1:]),
        test_utils=("test_schema", "test_faketensor"),
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        want = ops.gelu_depthwise(*arguments)
    assert counter.get_total_flops() == 2 * 9 * 2 * 5 * 7 * 32
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: ops.gelu_depthwise(*a), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), want)
