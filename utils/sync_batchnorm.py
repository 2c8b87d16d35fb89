"""Synchronised batch norms that torch.compile takes into its graphs.

The compiler does not know the kernels of torch's own, and they pick the processes that have images by a mask whose size
only the GPU knows: each of them ends a graph and waits for the GPU. Here the same numbers come from operations that the
compiler fuses with their neighbours; eagerly these would read the map more often than torch's kernels do.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name depends on torch


def use_traceable_batch_norms(module: nn.Module) -> None:
    """Make the synchronised batch norms in a module traceable, in place; names, weights and statistics stay."""
    for norm in module.modules():
        if type(norm) is nn.SyncBatchNorm:
            norm.__class__ = TraceableSyncBatchNorm  # it has the very same parameters, hooks and settings


class TraceableSyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the batches of all processes, in which each has as many images: (B, C, ...) -> same."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        values = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(values, [0, *range(2, x.dim())], correction=0)
        mean, var = _OverProcesses.apply(mean, var)
        with torch.no_grad():
            count = dist.get_world_size() * values.numel() // len(mean)
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shape = [-1] + [1] * (x.dim() - 2)
        return ((values - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


class _OverProcesses(torch.autograd.Function):
    """Mean and variance (C) of one process's batch -> of the batches of all processes."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        world_size = dist.get_world_size()
        gathered = mean.new_empty(2 * world_size, len(mean))
        _all_gather(gathered, torch.stack([mean, var]))
        means, variances = gathered.view(world_size, 2, len(mean)).unbind(1)
        between, total_mean = torch.var_mean(means, 0, correction=0)
        ctx.save_for_backward(mean - total_mean)
        return total_mean, variances.mean(0) + between

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor, var_gradient: Tensor) -> tuple[Tensor, Tensor]:
        (offset,) = ctx.saved_tensors
        gradients = torch.stack([mean_gradient, var_gradient])
        dist.all_reduce(gradients)
        mean_gradient, var_gradient = (gradients / dist.get_world_size()).unbind()
        return mean_gradient + 2 * var_gradient * offset, var_gradient
