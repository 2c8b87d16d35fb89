"""Compilation by torch.compile, one block a stage instead of the whole network."""

import re
from concurrent.futures import BrokenExecutor
from pathlib import Path

import torch
from torch import nn
from yacs.config import CfgNode

from models.cpu.fused import FusedGroupMixFormer, fuse
from models.groupmixformer import GroupMixFormer


def compile_blocks(network: GroupMixFormer | FusedGroupMixFormer, **options) -> None:
    """Compile the blocks of a network in place; its names, weights and state dict stay as they are.

    All blocks of a stage share one compilation, so that small's 22 blocks cost four. What compiles is the two branches
    of a block: the drop path between them stays outside, because every block has a rate of its own. Call it once moving
    average and checkpoints have their copies of the network: compiled functions cannot be copied. `options` go to
    torch.compile, with its inductor backend. The first forward pass, and the first with another input size, pay for the
    compilation.
    """
    options = {"dynamic": False, **options}
    # The network keeps its maps in channels-last order. Left to itself, the compiler orders gradients of convolutions
    # the other way in backward passes on a CPU, where depthwise ones then take five times as long.
    options["options"] = {"force_layout_optimization": True, **options.get("options", {})}
    # All blocks are one function to the compiler: each stage, batch size and input size counts against its limit of 8,
    # behind which it would silently run uncompiled.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # DDP would cut graphs of more than 1 MB of parameters, so that gradients travel while a whole network's backward
    # pass goes on. Blocks are small enough for that, and with gradient checkpointing a block that is cut in the forward
    # pass and not in its recomputation is an error.
    torch._dynamo.config.optimize_ddp = False
    if isinstance(network, FusedGroupMixFormer):
        for blocks in network.stages:
            for block in blocks:
                block.compile(**options)
        return
    for stage in network.groupmixformer_backbone:
        for block in stage.gma_stage:
            block.attention_branch = torch.compile(block.attention_branch, **options)
            block.mlp_branch = torch.compile(block.mlp_branch, **options)


def is_compiler_failure(error: Exception) -> bool:
    """Whether the compiler has failed, or one of the processes that it starts was killed."""
    from torch._dynamo.exc import BackendCompilerFailed  # asked for only now: they import much
    from torch._inductor.exc import CppCompileError

    return isinstance(error, BackendCompilerFailed | CppCompileError | BrokenExecutor)


def remove_unfinished_binary(error: Exception) -> str:
    """Where the compiler's cache holds a file that cannot be loaded, remove it, and return a line; else ''.

    A process that is killed while it compiles for a CPU leaves such a file, at times an empty one, and torch would fail
    at it again each time.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # asked for only now: it imports much

    found = re.search(rf"ImportError: ({re.escape(cache_dir())}/\S+\.so): (.*)", f"{type(error).__name__}: {error}")
    if found is None:
        return ""
    Path(found[1]).unlink(missing_ok=True)
    return f"{found[1]}: left by a compiler that was stopped ({found[2]}); it is removed now: start the command again"


def inference_network(config: CfgNode, network: GroupMixFormer) -> nn.Module:
    """The network that evaluates: fused with TEST.FUSE, compiled with COMPILE, else `network` itself."""
    network = fuse(network.eval()) if config.TEST.FUSE else network
    if config.COMPILE:
        compile_blocks(network)
    return network
