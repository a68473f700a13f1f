"""Agent attention beyond the common contract: what the formula promises, biases at other sizes, no training."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.attention import AgentAttention, create_attention, replace_attention
from coterie.attention.diffusion_agent import diffusion_agent_attention, merged_tokens, pooled_agents
from coterie.testing import generated_tensor, generated_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "agent"


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(**options) -> AgentAttention:
    torch.manual_seed(0)
    return AgentAttention(12, 3, **{"agents": 2, **options}).double().eval()


def test_it_is_the_formula_written_out():
    m, x = made(agents=(2, 3)), tokens(2, 4, 6, 12)
    q, k, v = m.qkv(x).reshape(2, 24, 3, 3, 4).permute(2, 0, 3, 1, 4)
    agents = q.reshape(2, 3, 2, 2, 3, 2, 4).mean((3, 5)).reshape(2, 3, 6, 4)
    gathered = (agents @ k.mT / 2).softmax(-1) @ v
    y = (q @ agents.mT / 2).softmax(-1) @ gathered
    torch.testing.assert_close(m(x), m.proj(y.transpose(1, 2).reshape(x.shape)))


def test_both_softmaxes_are_averages():
    """Equal values give that value, whatever queries, keys, biases and masks are."""
    m, x = made(bias_size=5), tokens(2, 5, 7, 12)
    with torch.no_grad():
        m.qkv.weight[24:] = 0
    expected = m.proj(m.qkv.bias[24:]).expand(x.shape)
    mask = torch.rand(2, 5, 7) > 0.4
    for given in (None, mask):
        torch.testing.assert_close(m(x, mask=given)[mask], expected[mask])


def test_as_many_agents_as_tokens_is_not_softmax_attention():
    m, x = made(agents=3), tokens(1, 3, 3, 12)
    q, k, v = m.qkv(x).reshape(1, 9, 3, 3, 4).permute(2, 0, 3, 1, 4)
    y = (q @ q.mT / 2).softmax(-1) @ (q @ k.mT / 2).softmax(-1) @ v
    torch.testing.assert_close(m(x), m.proj(y.transpose(1, 2).reshape(x.shape)))


@pytest.mark.parametrize(
    ("grid", "size"), [((9,), (9,)), ((9,), (5,)), ((4, 7), (4, 7)), ((4, 7), 6), ((3, 4, 2), (2, 2, 2))]
)
def test_a_padded_sample_gets_what_it_gets_alone(grid, size):
    """Agents, biases and convolution go by how far the real tokens of each sample reach."""
    m = made(bias_size=size, dwc=len(grid) == 2)
    x, larger = tokens(1, *grid, 12), tuple(n + 2 + i for i, n in enumerate(grid))
    inside = (slice(None), *(slice(n) for n in grid))
    padded, mask = tokens(2, *larger, 12, seed=2), torch.ones(2, *larger, dtype=torch.bool)
    padded[:1][inside] = x
    mask[0] = False
    mask[:1][inside] = True
    y = m(padded, mask=mask)
    torch.testing.assert_close(y[:1][inside], m(x))
    torch.testing.assert_close(y[1:], m(padded[1:]))


def test_biases_of_another_size_are_interpolated_linearly():
    m, x = made(bias_size=(4, 6)), tokens(1, 8, 9, 12)
    fitted = made(bias_size=(8, 9))
    state = m.state_dict()
    for side in ("key_bias", "query_bias"):
        for axis, length in enumerate((8, 9)):
            name = f"{side}.lines.{axis}"
            state[name] = F.interpolate(state[name], size=length, mode="linear")
    fitted.load_state_dict(state)
    torch.testing.assert_close(m(x), fitted(x))
    assert not torch.allclose(m(x), made()(x), atol=1e-4)


def test_prefix_tokens_have_no_place():
    """On a sequence with a class token: agents and convolution see the other tokens only, as a grid if it is known."""
    m, x = made(agents=(2, 2), bias_size=(3, 4), dwc=True, prefix_tokens=1), tokens(2, 13, 12)
    m.grids[12] = (3, 4)
    plain = made(agents=(2, 2), bias_size=(3, 4), dwc=True)
    state = {name: value for name, value in m.state_dict().items() if not name.endswith("prefix")}
    plain.load_state_dict(state)
    with torch.no_grad():
        m.key_bias.prefix.fill_(-1e9)  # nobody asks the class token
    torch.testing.assert_close(m(x)[:, 1:], plain(x[:, 1:].reshape(2, 3, 4, 12)).flatten(1, 2))
    mask = torch.ones(2, 13, dtype=torch.bool)
    torch.testing.assert_close(m(x, mask=mask), m(x))


def test_it_goes_into_a_timm_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=24, num_heads=3, depth=2).eval()
    report = replace_attention(vit, "agent", agents=4, prefix_tokens=1)
    assert len(report.swapped) == 2
    assert vit(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_agents_that_repeat_tokens_are_asked_for():
    x = tokens(1, 2, 3, 12)
    with pytest.raises(
        ValueError, match=r"has 9 agents, \(3, 3\) along the axes, for 6 tokens on grid \(2, 3\): take fe"
    ):
        made(agents=3)(x)
    assert made(agents=3, repeat=True)(x).shape == x.shape


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"agents": 0}, None, "agents must be at least 1, got 0"),
        ({"agents": (1, 1, 1, 1)}, None, "agents must be one number, or one per axis"),
        ({"agents": (2, 2, 2), "bias_size": 4}, None, r"agents=\(2, 2, 2\) must have one number, or one for each of 2"),
        ({"agents": (2, 2)}, (5,), r"agents=\(2, 2\) must have one number, or one for each of 1 axes"),
        ({"bias_size": 4}, (5,), r"x must have a 2-dimensional grid, as bias_size=\(4, 4\), got grid \(5,\)"),
        ({"dwc": True}, (5,), r"x must have a 2-dimensional grid for dwc=True, got grid \(5,\)"),
        ({"prefix_tokens": 1}, (5, 5), r"x must be a sequence of more than its 1 prefix tokens .* got grid \(5, 5\)"),
    ],
)
def test_bad_input(options, shape, message):
    with pytest.raises(ValueError, match=message):
        made(**options)(tokens(1, *(shape or (4, 4)), 12))


def test_without_training_it_is_the_authors_patch():
    figures = json.loads((GOLDEN / "diffusion.json").read_text())
    (rows, columns), dim, heads = figures["grid"], figures["dim"], figures["heads"]
    shapes = {f"to_{name}.weight": (dim, dim) for name in "qkv"} | {
        "to_out.0.weight": (dim, dim),
        "to_out.0.bias": (dim,),
    }
    weights = generated_weights(shapes.items(), figures["seed"])
    features = generated_tensor("features", (2, rows * columns, dim), figures["seed"]) * dim
    agents = merged_tokens(features, (rows, columns), ratio=figures["ratio"])
    expected = torch.tensor(figures["agents"], dtype=torch.float64)
    torch.testing.assert_close(agents.sort(1).values.flatten()[::7], expected, rtol=1e-12, atol=1e-12)

    def heads_of(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"to_{name}.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)

    query, key, value = (heads_of(features, name) for name in "qkv")
    y = diffusion_agent_attention(query, key, value, heads_of(agents, "q"))
    output = F.linear(y.transpose(1, 2).flatten(2), weights["to_out.0.weight"], weights["to_out.0.bias"])
    expected = torch.tensor(figures["output"], dtype=torch.float64)
    torch.testing.assert_close(output.flatten()[::9], expected, rtol=1e-12, atol=1e-12)


def test_the_module_with_the_same_constants_is_the_function():
    m, x = made(agents=(2, 2), k_scale2=0.3, k_shortcut=0.075), tokens(1, 4, 6, 12)
    query, key, value = m.project(x)
    y = diffusion_agent_attention(query, key, value, pooled_agents(query, (4, 6), 2))
    torch.testing.assert_close(m(x), m.proj(y.transpose(1, 2).reshape(x.shape)))


class Processor(nn.Module):
    """A stand-in for diffusers: its attention hands itself and the hidden states to such a processor."""

    def forward(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        x = hidden_states
        side = round(x.shape[1] ** 0.5)
        query, key, value = (
            f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        agents = pooled_agents(query, (side, side), max(1, side // 2))
        y = diffusion_agent_attention(query, key, value, agents, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))


def test_it_goes_into_a_processor():
    attn = nn.Module()
    attn.heads, attn.scale = 2, 0.5
    attn.to_q, attn.to_k, attn.to_v = (nn.Linear(8, 8) for _ in range(3))
    attn.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])
    x = torch.randn(2, 16, 8, requires_grad=True)
    Processor()(attn, x).square().sum().backward()
    assert x.grad.isfinite().all()


def test_tokens_are_merged_into_the_ones_they_are_like():
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])  # a row of two cells
    assert torch.equal(merged_tokens(x, (1, 4), ratio=0.5, cell=(1, 2)), torch.tensor([[[1.5, 0.0], [0.0, 2.0]]]))
    assert merged_tokens(x, (1, 4), ratio=0.0, cell=(1, 2)).shape == x.shape
    generator = torch.Generator().manual_seed(0)
    many = tokens(2, 30, 4)
    drawn = [merged_tokens(many, (5, 6), ratio=0.4, cell=2, generator=generator) for _ in range(4)]
    assert all(y.shape == (2, 18, 4) for y in drawn)
    assert any(not torch.equal(y, drawn[0]) for y in drawn[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: diffusion_agent_attention(q, q, q[:, :, :3], q), "query, key and value must have one shape"),
        (
            lambda q: diffusion_agent_attention(q, q, q, q[:, :1]),
            r"agents must have shape .* = \(1, 2, agents, 4\), got",
        ),
        (lambda q: diffusion_agent_attention(q[:, :, :3], q[:, :, :3], q[:, :, :3], q), "got 6 agents for 3 tokens"),
        (lambda q: pooled_agents(q, (2, 3), 3), r"along each axis of grid \(2, 3\), got \(3, 3\)"),
        (lambda q: pooled_agents(q, (2, 2), 1), r"query must have the 4 tokens of grid \(2, 2\), got 6"),
        (lambda q: merged_tokens(q[0], (2, 4), ratio=0.5), r"x must have shape \(batch, 8, dim\) for grid \(2, 4\)"),
        (lambda q: merged_tokens(q[0], (2, 3), ratio=0.5, cell=3), r"cell must fit into grid \(2, 3\), got 3"),
        (lambda q: merged_tokens(q[0], (2, 3), ratio=1.0), "ratio must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_input_without_training(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 2, 6, 4))


def test_options_of_create_attention():
    m = create_attention("agent", 12, 3, agents=3, bias_size=7, dwc=True)
    extra = sum(p.numel() for p in m.parameters()) - (4 * 12 * 12 + 4 * 12)
    assert extra == 3 * 9 * (2 * 49 + 2 * (7 + 7)) + 10 * 12
