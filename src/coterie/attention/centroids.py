"""Centroids that follow the queries of their groups: state that is learned by a moving average, not by gradient.

Dynamic Group Transformer, arXiv 2203.03937: once per training iteration, e <- norm((1 - tau) norm(e) + tau norm(mean
query of the group)) with tau = 0.1 * learning rate. What that takes in anybody's training loop:

- A training forward only adds its queries to the pending sums of their groups (gradient accumulation; several forwards
  a step). A forward that activation checkpointing repeats inside the backward pass is left out, and so are padding and
  evaluation.
- `follow_learning_rate(model, optimizer)` hooks into the optimizer: after each step, the pending sums of all modules
  are added over the ranks in one all-reduce, the centroids move, and the sums start again. A step that GradScaler skips
  is not a step.
- The sums are plain attributes in float32 or wider, not buffers: DistributedDataParallel would broadcast buffers, and
  checkpoints would keep them.

The two updates are torch.library operators that change their arguments, so a compiled training graph holds them
unbroken.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

_NEVER_TOLD = (
    "centroids of dynamic groups move with the learning rate, but training goes on and nobody told them what it is, so "
    "they move by their default_tau. Call coterie.follow_learning_rate(model, optimizer) once before the training loop."
)
_warned = False

_library = torch.library.Library("coterie", "FRAGMENT")
_library.define(
    "observe_queries(Tensor(a!) sums, Tensor(b!) counts, Tensor query, Tensor assignment, Tensor? mask) -> ()"
)
_library.define("settle_centroids(Tensor(a!) centroids, Tensor(b!) sums, Tensor(c!) counts, float tau) -> ()")


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, as a forward does that activation checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1


def _observe_queries(sums: Tensor, counts: Tensor, query: Tensor, assignment: Tensor, mask: Tensor | None) -> None:
    if _recomputing():
        return
    heads, groups, head_dim = sums.shape
    row = (assignment + torch.arange(heads, device=assignment.device).unsqueeze(-1) * groups).flatten()
    vectors = query.detach().to(sums.dtype).reshape(-1, head_dim)
    ones = torch.ones_like(row)
    if mask is not None:
        real = mask.unsqueeze(1).expand_as(assignment).flatten()
        vectors, ones = vectors.masked_fill(~real.unsqueeze(-1), 0.0), real.to(row.dtype)
    sums.view(-1, head_dim).index_add_(0, row, vectors)
    counts.view(-1).index_add_(0, row, ones)


def _settle_centroids(centroids: Tensor, sums: Tensor, counts: Tensor, tau: float) -> None:
    global _warned
    if _recomputing():
        return
    if not _warned and bool(counts.any()):
        _warned = True
        warnings.warn(_NEVER_TOLD, UserWarning, stacklevel=2)
    centroids.copy_(moved(centroids, sums, counts, tau))
    sums.zero_()
    counts.zero_()


_library.impl("observe_queries", _observe_queries, "CompositeExplicitAutograd")
_library.impl("settle_centroids", _settle_centroids, "CompositeExplicitAutograd")
for _name in ("observe_queries", "settle_centroids"):
    torch.library.register_fake(f"coterie::{_name}", lambda *_: None, lib=_library)


def moved(
    centroids: Float[Tensor, "heads groups head_dim"],
    sums: Float[Tensor, "heads groups head_dim"],
    counts: Int[Tensor, "heads groups"] | Float[Tensor, "heads groups"],
    tau: float,
) -> Float[Tensor, "heads groups head_dim"]:
    """norm((1 - tau) norm(e) + tau norm(mean query)); a group that is empty or has no finite sum stays as it is."""
    mean = F.normalize(sums / counts.clamp(min=1).unsqueeze(-1), dim=-1)
    new = F.normalize((1 - tau) * F.normalize(centroids, dim=-1) + tau * mean, dim=-1)
    # of length one, but for NaN and for opposite vectors that cancel at tau = 1/2
    changes = (counts > 0) & (new.square().sum(-1) > 0.5)
    return torch.where(changes.unsqueeze(-1), new, centroids)


class MovingCentroids(nn.Module):
    """What a module with centroids inherits: a buffer `centroids` (heads, groups, head_dim) of unit rows, which moves.

    The module has `num_heads`, `head_dim`, a projection `qkv` (whose learning rate the centroids follow), and calls
    `settle_centroids()` at the start and `observe_queries(...)` in every training forward. Centroids are float32, or
    float64 in a float64 model, never less: steps of 1e-4 would vanish in half precision. Pending sums are dropped when
    the module changes device or dtype, or loads a state.
    """

    centroids: Tensor
    num_heads: int
    head_dim: int
    qkv: nn.Linear

    def init_centroids(
        self,
        groups: int,
        *,
        rate: float,
        default_tau: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the buffer, at random unit vectors, and the empty sums."""
        for name, value, most in (("centroid_rate", rate, math.inf), ("default_tau", default_tau, 1.0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not 0 <= value <= most or value == math.inf:
                raise ValueError(f"{name} must be a number from 0 to {most}, got {value}")
        self.centroid_rate, self.default_tau = float(rate), float(default_tau)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("centroids", torch.empty(self.num_heads, groups, self.head_dim, device=device, dtype=wide))
        self._follower: CentroidFollower | None = None
        self.forget_queries()
        self.reset_centroids()

    def reset_centroids(self) -> None:
        """Random unit vectors, uniform over directions (nothing on the meta device)."""
        if not self.centroids.is_meta:
            with torch.no_grad():
                self.centroids.copy_(F.normalize(torch.randn_like(self.centroids), dim=-1))

    def forget_queries(self) -> None:
        """Drop the pending sums."""
        self._sums = torch.zeros_like(self.centroids)
        self._counts = torch.zeros(self.centroids.shape[:2], dtype=torch.int64, device=self.centroids.device)

    def observe_queries(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        assignment: Int[Tensor, "batch heads queries"],
        mask: Bool[Tensor, "batch queries"] | None,
    ) -> None:
        """Add the queries of a training forward to the pending sums of their groups; `mask` False is padding."""
        torch.ops.coterie.observe_queries(self._sums, self._counts, query.detach(), assignment, mask)

    def settle_centroids(self) -> None:
        """In a training loop that never told the learning rate: move by what the last forward left, and warn once."""
        if self.training and self._follower is None:
            torch.ops.coterie.settle_centroids(self.centroids, self._sums, self._counts, self.default_tau)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MovingCentroids":
        before = self.centroids
        super()._apply(fn, recurse)
        if torch.finfo(self.centroids.dtype).bits < 32:
            self.centroids = before.to(self.centroids.device)
        if self._sums.device != self.centroids.device or self._sums.dtype != self.centroids.dtype:
            self.forget_queries()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.get(f"{prefix}centroids")
        if isinstance(given, Tensor) and not given.is_meta and not bool(given.isfinite().all()):
            error_msgs.append(f"{prefix}centroids holds NaN or infinity: the checkpoint is damaged")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        wide = torch.promote_types(self.centroids.dtype, torch.float32)
        self.centroids = self.centroids.to(wide)  # load_state_dict(assign=True) takes any dtype
        self.forget_queries()


class CentroidFollower:
    """Handle of `follow_learning_rate`: moves the centroids after every optimizer step, until `remove()`.

    Copies of a module (for an exponential moving average, say) are not followed: copied or pickled, this is None.
    """

    def __init__(self, modules: list[MovingCentroids], optimizer: torch.optim.Optimizer) -> None:
        self._modules = modules
        for module in modules:
            module._follower = self
            module.forget_queries()
        self._hook = optimizer.register_step_post_hook(self._after_step)
        # whoever trains on with another optimizer is to be told
        weakref.finalize(optimizer, self._release).atexit = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    def remove(self) -> None:
        """Stop following; the modules count as never told again."""
        self._hook.remove()
        self._release()

    def _release(self) -> None:
        for module in self._mine():
            module._follower = None

    def _mine(self) -> Iterator[MovingCentroids]:
        return (module for module in self._modules if module._follower is self)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        modules = list(self._mine())
        if not modules:
            return
        totals = _over_ranks(modules)
        rates = _learning_rates(optimizer)
        for module, (sums, counts) in zip(modules, totals):
            rate = _rate_of(module, rates)
            if rate is not None:
                tau = min(1.0, module.centroid_rate * rate)
                module.centroids.copy_(moved(module.centroids, sums, counts, tau))
            module._sums.zero_()
            module._counts.zero_()


def follow_learning_rate(model: nn.Module, optimizer: torch.optim.Optimizer) -> CentroidFollower:
    """Let the centroids of a model move once per optimizer step, by tau = centroid_rate * learning rate.

    Call it once, after the optimizer is made and before training; nothing else changes in the loop. The rate is that of
    the parameter group which holds the module's qkv projection, read at every step, so schedules and warm-up work. A
    module whose projection is frozen keeps its centroids. With several optimizers, call it for each: a module follows
    the one that trains its projection. With torch.distributed initialised, sums are added over all ranks, and every
    rank must call this and take the same steps.

    Args:
        model: contains modules with centroids (also inside DistributedDataParallel, or compiled).
        optimizer: the optimizer that trains it, or Accelerate's wrapper around that.

    Returns:
        A handle with `.remove()`.

    Raises:
        ValueError: no module with centroids in the model, or none of them is trained by this optimizer.
        TypeError: not a model, not an optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # Accelerate's wrapper
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    found = [module for module in model.modules() if isinstance(module, MovingCentroids)]
    if not found:
        raise ValueError(f"model must contain dynamic group attention, got {type(model).__name__} without any")
    rates = _learning_rates(optimizer)
    modules = [m for m in found if _rate_of(m, rates) is not None or _frozen(m)]
    if not modules:
        raise ValueError(
            "optimizer must be the one that trains the model: its parameter groups hold the qkv projection of none of "
            f"the model's {len(found)} modules with centroids"
        )
    return CentroidFollower(modules, optimizer)


def _learning_rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def _rate_of(module: MovingCentroids, rates: dict[int, float]) -> float | None:
    """The learning rate of the module's qkv projection (of any part of it: adapters), or None if it is not trained."""
    for parameter in module.qkv.parameters():
        if id(parameter) in rates:
            return float(rates[id(parameter)])
    return None


def _frozen(module: MovingCentroids) -> bool:
    return not any(parameter.requires_grad for parameter in module.qkv.parameters())


def _over_ranks(modules: list[MovingCentroids]) -> list[tuple[Tensor, Tensor]]:
    """The pending sums and counts of each module, added over all ranks in one all-reduce."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [(module._sums, module._counts) for module in modules]
    parts = [part for module in modules for part in (module._sums, module._counts)]
    wide = max((module._sums.dtype for module in modules), key=lambda dtype: torch.finfo(dtype).bits)
    flat = torch.cat([part.flatten().to(wide) for part in parts])
    dist.all_reduce(flat)
    pieces = flat.split([part.numel() for part in parts])
    totals = [piece.view_as(part) for piece, part in zip(pieces, parts)]
    return list(zip(totals[::2], totals[1::2]))
