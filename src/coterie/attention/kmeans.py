"""Data-driven start of the centroids: spherical k-means on the queries of a batch.

Routing Transformer (arXiv 2003.05997) starts its centroids so. It matters here because they move slowly (tau = 0.1 *
learning rate): random directions leave many groups empty for thousands of steps. Seeds are spread by k-means++ (Arthur
and Vassilvitskii, 2007).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from coterie.attention.base import GridAttention, check_int
from coterie.attention.centroids import MovingCentroids


def spherical_kmeans(
    points: Float[Tensor, "heads points head_dim"],
    start: Float[Tensor, "heads groups head_dim"],
    *,
    iterations: int,
    generator: torch.Generator,
) -> Float[Tensor, "heads groups head_dim"]:
    """Unit centroids of the directions of some points, per head, by k-means++ seeding and Lloyd iterations.

    Where there are fewer different directions than groups, the groups left over keep their row of `start`.
    """
    points = F.normalize(points, dim=-1)
    heads, _, head_dim = points.shape
    centroids = F.normalize(start, dim=-1).clone()
    distance = torch.ones(points.shape[:2], dtype=points.dtype, device=points.device)
    for group in range(centroids.shape[1]):
        # + 1e-12: a row of zeros cannot be drawn from
        drawn = torch.multinomial(distance + 1e-12, 1, generator=generator)
        far = distance.gather(1, drawn) > 1e-6
        point = points.gather(1, drawn.unsqueeze(-1).expand(heads, 1, head_dim)).squeeze(1)
        centroids[:, group] = torch.where(far, point, centroids[:, group])
        to_new = 1 - torch.einsum("hnd,hd->hn", points, point)
        distance = torch.minimum(distance, to_new.clamp_min(0))
    for _ in range(iterations):
        nearest = torch.einsum("hnd,hgd->hng", points, centroids).argmax(-1)
        sums = torch.zeros_like(centroids).scatter_add_(1, nearest.unsqueeze(-1).expand_as(points), points)
        length = sums.norm(dim=-1, keepdim=True)
        centroids = torch.where(length > 1e-6, sums / length.clamp_min(1e-6), centroids)
    return centroids


@torch.no_grad()
def initialize_centroids(
    model: nn.Module, *inputs: Any, iterations: int = 10, max_tokens: int = 8192, seed: int = 0, **kwargs: Any
) -> list[str]:
    """Set the centroids of every dynamic group attention in a model from the queries of one batch.

    Runs `model(*inputs, **kwargs)` once without gradients, in evaluation mode (batch norms that never saw a batch
    normalise by this one and keep their statistics). Each module clusters its queries and then attends with the new
    centroids, so later blocks see what they will see. With torch.distributed initialised, all ranks get the centroids
    of rank 0.

    Args:
        model: contains modules with centroids.
        *inputs, **kwargs: a representative batch, as the model's forward takes it.
        iterations: of Lloyd's algorithm.
        max_tokens: queries used per head, drawn at random from the batch.
        seed: of the drawing.

    Returns:
        Names of the modules that were set: those that the forward reached.

    Raises:
        ValueError: no module with centroids in the model, or the forward reached none.
    """
    check_int("iterations", iterations)
    check_int("max_tokens", max_tokens)
    names = {module: name for name, module in model.named_modules() if isinstance(module, MovingCentroids)}
    if not names:
        raise ValueError(f"model must contain dynamic group attention, got {type(model).__name__} without any")
    generator = torch.Generator().manual_seed(seed)
    reached: list[str] = []

    def cluster(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, MovingCentroids)
        assert isinstance(module, GridAttention)
        x, context, mask = args[0] if args else kwargs["x"], (*args[1:], None)[0], kwargs.get("mask")
        context = kwargs.get("context", context)
        module.check(x, context, mask=mask)
        query, _, _ = module.project(x, context)
        ordinary = _ordinary(module, x, mask if context is None else None)
        points = query.detach().transpose(0, 1).flatten(1, 2)[:, ordinary]
        if points.shape[1] > max_tokens:
            drawn = torch.randperm(points.shape[1], generator=generator)[:max_tokens]
            points = points[:, drawn.to(points.device)]
        if points.shape[1] == 0:
            return
        found = spherical_kmeans(
            points.cpu().to(module.centroids.dtype), module.centroids.cpu(), iterations=iterations, generator=generator
        )
        module.centroids.copy_(found)
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(module.centroids, src=0)
        module.forget_queries()
        reached.append(names[module])

    modes = {module: module.training for module in model.modules()}
    fresh = [(norm, norm.momentum, count) for norm, count in _batch_norms(model) if int(count) == 0]
    hooks = [module.register_forward_pre_hook(cluster, with_kwargs=True) for module in names]
    try:
        model.eval()
        for norm, _, _ in fresh:
            norm.train()
            norm.momentum = 0.0
        model(*inputs, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum, count in fresh:
            norm.momentum = momentum
            count.zero_()
        for module, training in modes.items():
            module.training = training
    if not reached:
        raise ValueError("inputs must reach a module with centroids: the model's forward with them called none")
    return reached


def _ordinary(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """Bool (batch * queries): neither padding nor outside the groups."""
    keep = torch.ones(x.shape[0], x[0, ..., 0].numel(), dtype=torch.bool, device=x.device)
    keep[:, : getattr(module, "global_tokens", 0)] = False
    return (keep if mask is None else keep & mask.flatten(1)).flatten()


def _batch_norms(model: nn.Module) -> Iterator[tuple[nn.modules.batchnorm._BatchNorm, Tensor]]:
    """Batch norms with running statistics, and how many batches each has seen."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
            yield module, module.num_batches_tracked
