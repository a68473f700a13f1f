"""Inputs and gradients for the tests of composable attention (the file name keeps pytest from collecting it)."""

import torch
from torch import Tensor

from coterie import ops
from coterie.ops import HeadComposition

PARTS = HeadComposition._fields


def random_maps(batch, queries, keys, heads, rank=2, key_rank=None, parts=PARTS, dtype=torch.float64, strength=0.4):
    """Maps with the named parts, as leaves."""
    key_rank = rank if key_rank is None else key_rank
    shapes = {
        "query_in": (batch, queries, rank, heads),
        "query_out": (batch, queries, rank, heads),
        "query_gate": (batch, queries, heads),
        "key_in": (batch, keys, key_rank, heads),
        "key_out": (batch, keys, key_rank, heads),
        "key_gate": (batch, keys, heads),
        "static": (heads, heads),
    }
    return HeadComposition(
        *(
            (strength * torch.randn(shapes[name], dtype=dtype)).requires_grad_() if name in parts else None
            for name in PARTS
        )
    )


def inputs(batch=2, heads=3, queries=21, keys=None, dim=8, value_dim=None, kv_heads=None, dtype=torch.float64, **maps):
    """query, key, value, pre and post, as leaves."""
    keys, kv_heads = keys or queries, kv_heads or heads
    query = torch.randn(batch, heads, queries, dim, dtype=dtype, requires_grad=True)
    key = torch.randn(batch, kv_heads, keys, dim, dtype=dtype, requires_grad=True)
    value = torch.randn(batch, kv_heads, keys, value_dim or dim, dtype=dtype, requires_grad=True)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    pre, post = (random_maps(batch, queries, keys, heads, **{"dtype": wide} | maps) for _ in range(2))
    return query, key, value, pre, post


def leaves(query, key, value, pre, post):
    return [x for x in (query, key, value, *(pre or ()), *(post or ())) if x is not None]


def results(arguments, **options) -> list[Tensor]:
    """The output, and the gradient of every input under one fixed output gradient."""
    output = ops.composable_attention(*arguments, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves(*arguments), grad)]


def changed(arguments, function):
    """The same inputs with `function` applied to every tensor, as new leaves."""

    def change(x):
        return None if x is None else function(x.detach()).requires_grad_()

    query, key, value, pre, post = arguments
    return (
        change(query),
        change(key),
        change(value),
        *(None if maps is None else HeadComposition(*map(change, maps)) for maps in (pre, post)),
    )
