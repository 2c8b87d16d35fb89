"""FLOPs and parameters, counted by fvcore as the paper does: one multiply-add is one."""

import warnings

import torch
from torch import nn

with warnings.catch_warnings():  # fvcore compiles a loss of its own at import, with what torch deprecates
    warnings.simplefilter("ignore", FutureWarning)
    from fvcore.nn import FlopCountAnalysis, flop_count_table, parameter_count


def count_flops(network: nn.Module, input_shape: tuple[int, int, int]) -> tuple[int, int, str]:
    """FLOPs of one image of `input_shape` in evaluation mode, parameters, and the table of both by module."""
    network.eval()
    analysis = FlopCountAnalysis(network, torch.zeros(1, *input_shape, device=next(network.parameters()).device))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return int(analysis.total()), parameter_count(network)[""], flop_count_table(analysis, max_depth=3)
