"""Teaching torch's FLOP counter our operators without importing it: `torch.utils.flop_counter` brings triton along.

A counter copies the known formulas when it is made, so ours have to be there as soon as the module is: now if it is
loaded already, else in the moment when somebody imports it.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Register `formula(*shapes, ...)` of a torch operator packet: two FLOPs per multiply-add, as torch counts."""
    if _COUNTER in sys.modules:
        sys.modules[_COUNTER].register_flop_formula(operator)(formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _Finder())
    _waiting.append((operator, formula))


class _Finder(importlib.abc.MetaPathFinder):
    """Steps aside at the first import of the counter, after seeing to it that our formulas follow."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            while _waiting:
                operator, formula = _waiting.pop(0)
                module.register_flop_formula(operator)(formula)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
