"""Token-wise layers, some thousand tokens at a time: what lies between them then stays in the processor's cache.

A feed-forward network over all tokens of an image writes its widest tensor to memory and reads it back, twice; on fresh
pages, that costs as much as its arithmetic. A few thousand tokens at a time it does not leave the cache.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

ROWS = 2048


def by_rows(
    module: nn.Module,
    function: Callable[..., Tensor],
    *tokens: Float[Tensor, "*grid dim"],
) -> Float[Tensor, "*grid dim"]:
    """`function(*tokens)`, which treats every token by itself and gives the shape of the first argument.

    In inference on the CPU it is called for some tokens after others, (rows, dim) each; else, or if somebody listens by
    a hook to what goes on inside `module`, once for all.
    """
    first = tokens[0]
    if (
        not isinstance(first, Tensor)  # torch.fx
        or torch.is_grad_enabled()
        or module.training
        or first.device.type != "cpu"
        or torch.compiler.is_compiling()
        or first.shape[:-1].numel() <= ROWS
        or any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    ):
        return function(*tokens)
    rows = [x.reshape(-1, x.shape[-1]).split(ROWS) for x in tokens]
    y: Tensor | None = None
    start = 0
    for some in zip(*rows, strict=True):
        part = function(*some)
        if y is None:  # only now is the dtype known, under autocast
            y = part.new_empty(first.shape[:-1].numel(), first.shape[-1])
        y[start : start + len(part)] = part
        start += len(part)
    assert y is not None
    return y.view(first.shape)
