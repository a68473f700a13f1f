"""Values that only change when weights do: in inference they are computed once and kept."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from coterie.ops._state import autocasting


class Keeper(nn.Module):
    """A module whose value depends on its parameters and a few sizes, such as a bias for every pair of tokens."""

    _kept: tuple[tuple[Any, ...], Tensor] | None = None

    def kept(self, sizes: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """`make()`; in inference the last value is kept, for the same `sizes`, until a parameter changes.

        A change is told by where a parameter lies and by its version, which a step and loading raise. Whoever writes
        weights through `.data` calls `train` or `eval`, which forget it.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        state = _state(self.parameters())
        if state is None:
            return make()
        first = next(self.parameters())
        key = (sizes, first.device, first.dtype, autocasting(first.device.type), *state)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, make())
        return self._kept[1]

    def train(self, mode: bool = True) -> Self:
        """Also forgets what was kept."""
        self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = None  # there and back again (`bfloat16().float()`) may end at the same place in memory
        return super()._apply(*args, **kwargs)


def _state(parameters: Iterable[Tensor]) -> tuple[tuple[int, int], ...] | None:
    """What a change of these tensors would change; None where that cannot be told."""
    parameters = list(parameters)
    if any(p.is_meta for p in parameters):
        return None
    try:
        return tuple((p.data_ptr(), p._version) for p in parameters)
    except RuntimeError:  # made in inference mode, or wrapped by torch.func
        return None
