"""Weights made from nothing but each parameter's name and shape, so that figures can be kept and weights need not be.

Two programs that hold the same parameters, ours and an authors', get the same weights from one rule, and their outputs
can be compared by a file of names, shapes, a seed and figures. The rule does not depend on versions of torch or numpy:

    bits    PCG64, seeded with the first 8 bytes (little endian) of sha256("{seed}:{name}"); its raw 64-bit words, of
            which the upper 53 bits, times 2^-53, are uniform in [0, 1)
    values  u = sqrt(3)·(2·uniform - 1), of mean 0 and variance 1, in row-major order
    scale   matrices and beyond: u·size^(-1/4) with size the number of values: 1/sqrt(n) for an (n, n) matrix
            vectors and scalars: 1 + u/10 if the name ends in "weight" or "scale" (norms), else u/10 (biases)
"""

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def generated_weights(
    named_shapes: Iterable[tuple[str, Iterable[int]]], seed: int = 0, *, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """A tensor for every (name, shape), by the rule above; the order of the names does not matter."""
    return {name: generated_tensor(name, shape, seed, dtype=dtype) for name, shape in named_shapes}


def generated_tensor(name: str, shape: Iterable[int], seed: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The tensor of this name and shape; made in float64, then cast to `dtype`."""
    size = tuple(int(n) for n in shape)
    uniform = _uniform(name, math.prod(size), seed)
    values = torch.from_numpy(math.sqrt(3) * (2 * uniform - 1)).reshape(size)
    if len(size) > 1:
        values = values * math.prod(size) ** -0.25
    else:
        values = values / 10 + float(name.endswith(("weight", "scale")))
    return values.to(dtype)


def _uniform(name: str, count: int, seed: int) -> np.ndarray:
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    words = np.asarray(np.random.PCG64(key).random_raw(count), dtype=np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
