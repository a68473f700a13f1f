"""Two processes with half of the batch each move weights and centroids as one process with the whole batch does."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from coterie.attention import DynamicGroupAttention, follow_learning_rate, initialize_centroids


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = DynamicGroupAttention(8, 2, groups=4, top_k=3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.attention(self.norm(x))


def build():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double()


def batches():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 9, 8, dtype=torch.float64, generator=generator)


def train(model, data, micro_batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    follow_learning_rate(model, optimizer)
    for batch in data:
        optimizer.zero_grad()
        for part in batch.chunk(micro_batches):
            (model(part).square().mean() / micro_batches).backward()
        optimizer.step()


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build()
    parallel = nn.parallel.DistributedDataParallel(model)
    train(parallel, batches()[:, 2 * rank : 2 * rank + 2], micro_batches=2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    initialize_centroids(model, batches()[rank])
    state["started"] = model[0].attention.centroids
    torch.save(state, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    model = build().train()
    train(model, batches(), micro_batches=1)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        torch.testing.assert_close(ranks[0][name], value)
    assert not torch.equal(model[0].attention.centroids, build()[0].attention.centroids)
    assert torch.equal(ranks[0]["started"], ranks[1]["started"])
