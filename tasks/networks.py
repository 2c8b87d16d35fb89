"""From configuration to network."""

from yacs.config import CfgNode

from configs import UserError
from models.groupmixformer import GroupMixFormer


def build_model(config: CfgNode) -> GroupMixFormer:
    """Build the network that MODEL.GMA describes; UserError where its widths and heads cannot be cut evenly."""
    gma = config.MODEL.GMA
    try:
        model = GroupMixFormer(
            num_classes=gma.NUM_CLASSES,
            in_chans=gma.IN_DIM,
            embed_dims=gma.EMBEDDING_DIMS,
            depths=gma.SERIAL_DEPTHS,
            mlp_ratios=gma.MLP_RATIOS,
            num_heads=gma.NUM_HEADS,
            group_sizes=gma.GROUP_SIZES,
            qkv_bias=gma.QKV_BIAS,
            qk_scale=gma.QKV_SCALE,
            proj_drop_rate=gma.DROP_RATE,
            attn_drop_rate=gma.ATTN_DROP_RATE,
            drop_path_rate=gma.DROP_PATH_RATE,
        )
    except ValueError as error:
        raise UserError(f"MODEL.GMA: {error}") from None
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model
