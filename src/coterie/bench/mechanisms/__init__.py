"""The measured operations, one file each, registered by being imported; see `registry.BenchOp` for what an entry says.

FLOPs are 2 per multiply-add of the matrix products, which is all that grows; softmax, norms and sorting are left out.
The backward pass of an attention is twice its forward (gradients of weights and values, then of queries and keys);
recomputing the scores, as kernels do to save memory, is their choice and not part of the floor.
"""

from coterie.bench.mechanisms import composable, dynamic_group, exact

__all__ = ["composable", "dynamic_group", "exact"]
