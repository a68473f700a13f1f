"""What every mechanism of `list_attention()` promises, whatever it is. A new one is tested here by being registered."""

import copy
import inspect

import pytest
import torch

from coterie.attention import (
    PATTERNS,
    CascadedGroupAttention,
    GridAttention,
    HiLoAttention,
    attention_class,
    attention_options,
    create_attention,
    list_attention,
    register_attention,
)
from coterie.ops import operations

GRIDS = {1: (11,), 2: (5, 7), 3: (3, 4, 2)}
SMALL = {
    "groups": 3,
    "top_k": 4,
    "window_size": 3,
    "stripe_width": 2,
    "regions": 3,
    "agents": 2,
    "group_size": 3,
}  # so that tiny grids have several groups and windows
DIM, HEADS = 12, 3
OWN_PROJECTIONS = {
    "hilo",
    "cascaded_group",
}  # mechanisms with the parameters of their paper instead of `qkv` and `proj`


def make(name, *, block_index=1, **options):
    torch.manual_seed(0)
    small = {k: v for k, v in SMALL.items() if k in attention_options(name)}
    return create_attention(name, DIM, HEADS, block_index=block_index, **{**small, **options})


def tokens(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def output_bias(m):
    """What a token gets that may attend to nothing."""
    if isinstance(m, HiLoAttention):  # each group of heads has its own projection
        return torch.cat([m.h_proj.bias, m.l_proj.bias])
    if isinstance(m, CascadedGroupAttention):  # with a normalisation, which has the bias
        return m.proj(torch.zeros(1, DIM, 1, 1, dtype=m.attention_biases.dtype)).flatten()
    return m.proj.bias


CASES = [
    pytest.param(name, dims, id=f"{name}-{dims}d")
    for name in list_attention()
    for dims in attention_class(name).grid_dims
]


@pytest.mark.parametrize("name", list_attention())
def test_the_operation_that_it_names_exists(name):
    operation = attention_class(name).operation
    assert operation in {"scaled_dot_product_attention", "matmul", *operations()}  # torch's, or one of ours


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_output_has_the_shape_and_dtype_of_the_input(name, dims):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        m = make(name, dtype=dtype).eval()
        x = tokens(2, *GRIDS[dims], DIM, dtype=torch.float32).to(dtype)
        y = m(x)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert y.isfinite().all()
        side = getattr(m, "regions", max(getattr(m, "agents", (1,))))  # the smallest grid that it takes
        one = m(x[:1, *(slice(side) for _ in range(dims))])
        assert one.shape == (1, *(side,) * dims, DIM)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_every_parameter_and_the_input_get_a_finite_gradient(name, dims):
    m = make(name, similarity="cosine").double().train()
    x = tokens(2, *GRIDS[dims], DIM).requires_grad_()
    (m(x) * tokens(2, *GRIDS[dims], DIM, seed=2)).sum().backward()
    for parameter in (x, *m.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_evaluation_is_deterministic_and_changes_no_state(name, dims):
    m, x = make(name).double().eval(), tokens(2, *GRIDS[dims], DIM)
    before = copy.deepcopy(m.state_dict())
    assert torch.equal(m(x), m(x))
    for key, value in m.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_a_sample_does_not_depend_on_its_batch(name, dims):
    m, x = make(name).double().eval(), tokens(3, *GRIDS[dims], DIM)
    for i in range(3):
        torch.testing.assert_close(m(x[i : i + 1])[0], m(x)[i])


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_masked_tokens_have_no_influence(name, dims):
    m, x = make(name).double().eval(), tokens(2, *GRIDS[dims], DIM)
    mask = torch.rand(2, *GRIDS[dims], generator=torch.Generator().manual_seed(3)) > 0.3
    other = torch.where(mask.unsqueeze(-1), x, 100 * tokens(2, *GRIDS[dims], DIM, seed=4))
    torch.testing.assert_close(m(x, mask=mask)[mask], m(other, mask=mask)[mask])
    torch.testing.assert_close(m(x, mask=torch.ones_like(mask)), m(x))
    x = x.clone().requires_grad_()
    y = m(x, mask=torch.zeros_like(mask))
    torch.testing.assert_close(y, output_bias(m).expand_as(y))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_memory_layout_does_not_matter(name, dims):
    m, x = make(name).double().eval(), tokens(2, *GRIDS[dims], DIM)
    channels_first = x.movedim(-1, 1).contiguous().movedim(1, -1)
    strided = tokens(2, *GRIDS[dims], 2 * DIM)[..., ::2].copy_(x)
    for view in (channels_first, strided):
        assert not view.is_contiguous()
        torch.testing.assert_close(m(view), m(x))


@pytest.mark.parametrize("name", list_attention())
def test_state_dict_round_trip(name):
    grid = GRIDS[max(attention_class(name).grid_dims)]
    m, x = make(name).double(), tokens(2, *grid, DIM)
    torch.manual_seed(9)
    other = create_attention(
        name, DIM, HEADS, block_index=1, **{k: v for k, v in SMALL.items() if k in attention_options(name)}
    ).double()
    assert not torch.equal(other.eval()(x), m.eval()(x))
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(x), m(x))
    assert torch.equal(copy.deepcopy(m)(x), m(x))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_all_mechanisms_have_the_same_projections(similarity):
    shapes = [
        {
            k: tuple(p.shape)
            for k, p in create_attention(name, DIM, HEADS, similarity=similarity).named_parameters()
            if not k.startswith("maps.")  # how the heads of "composable" compose
        }
        for name in list_attention()
        if name not in OWN_PROJECTIONS
    ]
    assert all(s == shapes[0] for s in shapes)
    assert sum(p.numel() for p in create_attention("global", DIM, HEADS).parameters()) == 4 * DIM * DIM + 4 * DIM


@pytest.mark.parametrize("name", list_attention())
def test_declared_patterns_run_and_the_others_are_refused(name):
    cls = attention_class(name)
    m, grid = make(name).double().eval(), GRIDS[min(cls.grid_dims)]
    x, context = tokens(2, *grid, DIM), tokens(2, *(n + 1 for n in grid), DIM, seed=5)
    for pattern in PATTERNS:
        args = (x, context) if "cross" in pattern else (x,)
        if pattern in cls.patterns:
            assert m(*args, is_causal="causal" in pattern).shape == x.shape
        else:
            with pytest.raises(ValueError, match=f"does not support {pattern} attention; it supports: .*self"):
                m(*args, is_causal="causal" in pattern)


@pytest.mark.parametrize("name", [n for n in list_attention() if "causal self" in attention_class(n).patterns])
def test_causal_attention_does_not_see_the_future(name):
    m, x = make(name).double().eval(), tokens(2, 11, DIM)
    future = x.clone()
    future[:, 6:] += 5
    torch.testing.assert_close(m(x, is_causal=True)[:, :6], m(future, is_causal=True)[:, :6])
    mask = torch.arange(11).expand(2, 11) > 1
    y = m(x, mask=mask, is_causal=True)
    torch.testing.assert_close(y[:, :2], m.proj.bias.expand(2, 2, DIM))
    torch.testing.assert_close(y[:, 2:], m(x[:, 2:], is_causal=True))
    tail = m(x[:, 8:], x, is_causal=True)  # fewer queries than keys: aligned at the end
    torch.testing.assert_close(tail, m(x, is_causal=True)[:, 8:])


@pytest.mark.parametrize("name", [n for n in list_attention() if "bidirectional cross" in attention_class(n).patterns])
def test_attending_to_oneself_as_context_is_self_attention(name):
    m, x = make(name).double().eval(), tokens(2, 11, DIM)
    torch.testing.assert_close(m(x, x), m(x))
    without_bias = make(name, qkv_bias=False).double().eval()
    torch.testing.assert_close(without_bias(x, x), without_bias(x))
    assert m(x, tokens(2, 3, 4, DIM)).shape == x.shape


@pytest.mark.parametrize("name", list_attention())
def test_bad_calls_say_what_was_wrong(name):
    m = make(name)
    dims = min(attention_class(name).grid_dims)
    x = torch.randn(2, *GRIDS[dims], DIM)
    wrong_dims = next(d for d in range(1, 5) if d not in attention_class(name).grid_dims)
    mask = torch.ones(x.shape[:-1], dtype=torch.bool)
    for args, kwargs, error, text in [
        (("tokens",), {}, TypeError, "x must be a tensor, got str"),
        ((x.long(),), {}, TypeError, r"x must be a floating-point tensor, got torch.int64"),
        (
            (torch.randn(2, *(3,) * wrong_dims, DIM),),
            {},
            ValueError,
            r"x must be \(batch, \*grid, dim\) with a .*-dimensional grid",
        ),
        ((torch.randn(DIM),), {}, ValueError, r"got shape \(12,\)"),
        ((x[..., :8],), {}, ValueError, "x must have 12 channels in its last dimension"),
        ((x[:, :0],), {}, ValueError, "x must hold at least one token"),
        ((x[:0],), {}, ValueError, "x must hold at least one token"),
        ((x.double(),), {}, ValueError, r"x must have the dtype of .*, torch.float32, got torch.float64"),
        ((x.to("meta"),), {}, ValueError, "x must be on the device of .*, cpu, got meta"),
        ((x,), {"mask": mask.float()}, TypeError, r"mask must be a bool tensor .*, got torch.float32"),
        ((x,), {"mask": [True]}, TypeError, "mask must be a bool tensor .*, got list"),
        ((x,), {"mask": mask[:1]}, ValueError, r"mask must have the shape \(batch, \*key grid\) = "),
        ((x,), {"mask": mask.to("meta")}, ValueError, "mask must be on the device of the tokens, cpu, got meta"),
        ((x,), {"cache": object()}, ValueError, "keeps no cache, got cache=object"),
    ]:
        with pytest.raises(error, match=text):
            m(*args, **kwargs)
    if "bidirectional cross" in attention_class(name).patterns:
        with pytest.raises(ValueError, match="context must have the batch size of x, 2, got 3"):
            m(x, torch.randn(3, 4, DIM))
        with pytest.raises(ValueError, match="context must have 12 channels"):
            m(x, torch.randn(2, 4, 8))


@pytest.mark.parametrize("name", list_attention())
def test_bad_options_say_what_was_wrong(name):
    with pytest.raises(ValueError, match="num_heads must divide dim, got num_heads=5 and dim=12"):
        create_attention(name, 12, 5)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        create_attention(name, 0, 1)
    with pytest.raises(TypeError, match="num_heads must be an int"):
        create_attention(name, 12, 3.0)
    with pytest.raises(ValueError, match=f"attention '{name}' has no option 'nonsense'; it takes: .*qkv_bias"):
        create_attention(name, 12, 3, nonsense=1)
    with pytest.raises(ValueError, match="similarity must be one of 'dot', 'cosine', got 'l2'"):
        create_attention(name, 12, 3, similarity="l2")


@pytest.mark.parametrize("name", list_attention())
def test_it_runs_under_autocast_and_compiles_in_one_graph(name):
    m = make(name, similarity="cosine").eval()
    x = torch.randn(2, *GRIDS[max(m.grid_dims)], DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert m(x).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), m(x))


@pytest.mark.parametrize("name", list_attention())
def test_it_is_documented_and_its_call_is_the_common_one(name):
    cls = attention_class(name)
    assert cls.__doc__
    assert list(inspect.signature(cls.forward).parameters) == ["self", "x", "context", "mask", "is_causal", "cache"]
    documented = (cls.__doc__ or "") + (GridAttention.__doc__ or "")
    assert [option for option in attention_options(name) if option not in documented] == []
    assert set(inspect.signature(cls).parameters) >= {"dim", "num_heads"}


def test_registration_refuses_doubles_and_undeclared_abilities():
    with pytest.raises(ValueError, match="registered already"):
        register_attention("global")(attention_class("global"))
    for declared in ({}, {"grid_dims": frozenset({4}), "patterns": frozenset({"bidirectional self"})}):
        with pytest.raises(ValueError, match="grid_dims must be a non-empty subset"):
            register_attention("new")(type("New", (GridAttention,), declared))
    with pytest.raises(ValueError, match=r"attention must be one of 'agent', 'bi_level_routing', .*, got 'local'"):
        create_attention("local", 12, 3)
    assert "new" not in list_attention()
