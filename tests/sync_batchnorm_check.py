"""Run by test_distributed.py: a network on two processes against the whole batch on one, in float64.

Prints a line of JSON: the largest errors of logits, gradients and running statistics, and the compiler's graph breaks.
"""

import copy
import json
import sys
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import GroupMixFormer
from tasks.networks import compile_blocks
from utils.processes import WITHOUT_BUFFERS
from utils.sync_batchnorm import TraceableSyncBatchNorm, use_traceable_batch_norms


def main(compiled: bool, checkpointed: bool) -> None:
    torch._dynamo.utils.counters.clear()  # of the process that this one is a fork of
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = GroupMixFormer(num_classes=3, embed_dims=(40,), depths=(2,), mlp_ratios=(2,)).double().train()
    network = copy.deepcopy(whole)
    model = nn.parallel.DistributedDataParallel(network, **WITHOUT_BUFFERS)
    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # before DDP on GPUs, which refuses it on CPUs
    use_traceable_batch_norms(network)
    assert sum(isinstance(module, TraceableSyncBatchNorm) for module in network.modules()) == 12
    network.set_grad_checkpointing(checkpointed)
    if compiled:
        compile_blocks(network)
    images = 3 + torch.randn(2 * world_size, 3, 40, 32, dtype=torch.float64)
    images[::2] *= 4  # so that the processes' means and variances differ
    share = slice(rank, None, world_size)
    for _ in range(2):
        expected, logits = whole(images), model(images[share])
        expected.square().mean().backward()
        logits.square().mean().backward()
    gradients = [(p.grad - q.grad).abs().max() for p, q in zip(network.parameters(), whole.parameters())]
    buffers = [(p - q).abs().max().item() for p, q in zip(network.buffers(), whole.buffers())]
    errors = torch.stack([(logits - expected[share]).abs().max(), torch.stack(gradients).max()]).detach()
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    if rank == 0:
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print(json.dumps({"errors": [*errors.tolist(), max(buffers)], "breaks": breaks, "graphs": graphs}))
    del model, network, logits  # torch 2.10 does not end where they outlive their processes' group
    dist.destroy_process_group()


if __name__ == "__main__":
    main("--compile" in sys.argv, "--use-checkpoint" in sys.argv)
