"""Argument checks that operations share: what was wrong, what was given, what is taken."""

from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op: str, name: str, value: Any, layout: str) -> None:
    """`value` is a floating tensor with one dimension per word of `layout`, none of them empty."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim != len(layout.split()):
        raise ValueError(f"{op}: {name} must have shape ({', '.join(layout.split())}), got {tuple(value.shape)}")
    if value.dtype not in _FLOATS:
        raise TypeError(f"{op}: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
    for word, size in zip(layout.split(), value.shape):
        if size == 0:
            raise ValueError(f"{op}: {name} has no {word}: its shape is {tuple(value.shape)}")


def check_index(op: str, name: str, value: Any, layout: str) -> None:
    """`value` is an int64 tensor with one dimension per word of `layout`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {value.dtype}")
    if value.ndim != len(layout.split()):
        raise ValueError(f"{op}: {name} must have shape ({', '.join(layout.split())}), got {tuple(value.shape)}")


def check_same(op: str, what: str, names: str, first: Any, second: Any) -> None:
    """Two properties of two arguments are equal; `names` is 'query and key'."""
    if first != second:
        raise ValueError(f"{op}: {names} must agree in {what}, got {first} and {second}")


def check_key_mask(op: str, key_mask: Any, batch: int, keys: int, device: torch.device) -> None:
    """`key_mask` is None or bool (batch, keys) on `device`; True = may be attended to."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"{op}: key_mask must be a torch.Tensor or None, got {type(key_mask).__name__}")
    if key_mask.dtype != torch.bool:
        raise TypeError(f"{op}: key_mask must be bool (True = may be attended to), got {key_mask.dtype}")
    if tuple(key_mask.shape) != (batch, keys):
        raise ValueError(f"{op}: key_mask must have shape (batch, keys) = {(batch, keys)}, got {tuple(key_mask.shape)}")
    check_same(op, "device", "query and key_mask", device, key_mask.device)


def check_positive_int(op: str, name: str, value: Any) -> None:
    """`value` is an int of at least 1 (a symbolic int while tracing passes)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if isinstance(value, int) and value < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def check_scale(op: str, scale: Any) -> None:
    """`scale` is None or a positive finite number."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")


def check_finite_once(op: str, name: str, value: Tensor) -> None:
    """`value` holds no NaN or infinity.

    Looked at once per content of a tensor, and not where looking would cost: while tracing, and in training on a GPU,
    which would wait.
    """
    if torch.compiler.is_compiling() or (value.is_cuda and torch.is_grad_enabled()):
        return
    if type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or value.is_meta:
        return
    version = value._version if not value.is_inference() else None
    if version is not None and getattr(value, "_coterie_finite", None) == version:
        return
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        where = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} holds NaN or infinity, first at index {where}")
    if version is not None:
        value._coterie_finite = version  # type: ignore[attr-defined]
