"""From configuration to network: built, compiled, or fused for inference."""

from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from configs import UserError, image_size
from models import GroupMixFormer
from models.cpu.fused import FusedGroupMixFormer, fuse
from models.groupmixformer import STEM_STRIDE
from utils.precision import Precision
from utils.sync_batchnorm import use_traceable_batch_norms


def build_model(config: CfgNode) -> GroupMixFormer:
    """Build the network that MODEL.GMA describes; UserError where its widths and heads cannot be cut evenly."""
    try:
        model = GroupMixFormer(**network_arguments(config))
    except ValueError as error:
        raise UserError(f"MODEL.GMA: {error}") from None
    checkpointing = config.TRAIN.USE_CHECKPOINT
    model.set_grad_checkpointing(bool(checkpointing), selective=checkpointing == "selective")
    return model


def network_arguments(config: CfgNode) -> dict[str, Any]:
    """The arguments of `GroupMixFormer` by MODEL.GMA."""
    gma = config.MODEL.GMA
    return dict(
        num_classes=gma.NUM_CLASSES,
        in_chans=gma.IN_DIM,
        embed_dims=gma.EMBEDDING_DIMS,
        depths=gma.SERIAL_DEPTHS,
        mlp_ratios=gma.MLP_RATIOS,
        num_heads=gma.NUM_HEADS,
        group_sizes=gma.GROUP_SIZES,
        local_branch=gma.LOCAL_BRANCH,
        relative_position=gma.RELATIVE_POSITION,
        qkv_bias=gma.QKV_BIAS,
        qk_scale=gma.QKV_SCALE,
        proj_drop_rate=gma.DROP_RATE,
        attn_drop_rate=gma.ATTN_DROP_RATE,
        drop_path_rate=gma.DROP_PATH_RATE,
    )


def check_batch_norms(config: CfgNode, synchronised: int) -> None:
    """Raise UserError where a batch norm of the last stage would see one value a channel in training: it needs two.

    Args:
        config: batch, image size and stages.
        synchronised: the processes whose batches a batch norm sees together.
    """
    stride = STEM_STRIDE * 2 ** (config.MODEL.GMA.NUM_STAGES - 1)
    if config.DATA.BATCH_SIZE * synchronised == 1 and stride >= max(image_size(config)):
        raise UserError(
            f"DATA.BATCH_SIZE = 1 at DATA.IMG_SIZE = {config.DATA.IMG_SIZE}: batch norms of the last stage see one "
            f"value a channel, and need two to train; take batches of 2, or images of at least {stride + 1} pixels"
        )


def inference_network(config: CfgNode, network: GroupMixFormer) -> nn.Module:
    """The network that evaluates: fused with TEST.FUSE, compiled with COMPILE, else `network` itself."""
    network = fuse(network.eval()) if config.TEST.FUSE else network
    if config.COMPILE:
        compile_blocks(network)
    return network


def compile_for_training(network: GroupMixFormer, precision: Precision, memory: float) -> None:
    """`compile_blocks`, synchronised batch norms included; raises UserError under autocast on a CPU.

    `memory` is the share of what a block would keep for its backward pass that it may keep, COMPILE_MEMORY.

    On some CPUs, compiled autocast gradients are non-finite (torch 2.10 to 2.14); logits are right everywhere.
    """
    if precision.enabled and precision.device_type == "cpu":
        raise UserError(
            f"COMPILE with {precision} on a CPU: torch {torch.__version__} may compile gradients that are not finite; "
            "train in float32 (--amp-opt-level O0) or without --compile"
        )
    use_traceable_batch_norms(network.groupmixformer_backbone)
    torch._functorch.config.activation_memory_budget = memory
    compile_blocks(network)


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
    # beyond which it would silently run uncompiled.
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
