"""Train a GroupMixFormer, on one process or many.

python train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
"""

import torch
from timm.utils import ModelEmaV3

from configs import with_num_classes
from data import (
    build_eval_loader,
    build_mixup,
    build_train_loader,
    check_val_classes,
    open_split,
    usable_workers,
)
from models import build_model
from utils.checkpoint import load_pretrained
from utils.distributed import share_running_statistics, wrap_distributed
from utils.engine import Trainer, build_criterion, build_precision, build_scaler, evaluate, train_one_epoch
from utils.evaluation import run_evaluation
from utils.logging import TensorBoard, write_config
from utils.optimizer import build_optimizer
from utils.resume import Progress, find_resume, restore, save_epoch
from utils.schedule import build_scheduler, global_batch_size, scaled_learning_rates
from utils.session import run_script, start_session


def main() -> None:
    # ------------------------------------------------------------------------ configuration, processes, run folder, log
    session = start_session(__doc__)
    config, processes, folder, logger = session.config, session.processes, session.folder, session.logger
    if not session.trains:
        run_evaluation(session)
        return

    # ------------------------------------------------------------------------------------------------------------- data
    share = (processes.rank, processes.world_size)
    train_source, val_source = open_split(config, "train", *share), open_split(config, "val", *share)
    check_val_classes(config, train_source, val_source)
    config = with_num_classes(config, len(train_source.classes))
    pin_memory = processes.device.type == "cuda"
    train_loader, order = build_train_loader(config, train_source, *share, pin_memory)
    val_loader = build_eval_loader(config, val_source, *share, pin_memory)
    mixup = build_mixup(config)
    logger.info(
        f"{len(train_source.samples)} training and {len(val_source.samples)} validation images of "
        f"{len(train_source.classes)} classes, {usable_workers(config)} loader workers a process"
    )

    # ------------------------------------------------------------------------------------------------------------ model
    torch.manual_seed(config.SEED + processes.rank)
    network = build_model(config).to(processes.device)
    resume_path = find_resume(config, folder, processes)
    if config.MODEL.PRETRAINED and not resume_path:
        logger.info(f"starting from {load_pretrained(network, config.MODEL.PRETRAINED, config.MODEL.CLASS_MAP)}")
    model = wrap_distributed(network, processes)

    # ------------------------------------------------------------------------------ optimizer, schedule, precision, EMA
    rates = scaled_learning_rates(config, processes.world_size)
    optimizer = build_optimizer(config, network, rates.base)
    precision = build_precision(config, processes.device)
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, rates, order.updates_per_epoch),
        scaler=build_scaler(precision),
        ema=ModelEmaV3(network, decay=config.EMA.DECAY, use_warmup=config.EMA.WARMUP) if config.EMA.ENABLED else None,
        mixup=mixup,
        criterion=build_criterion(mixup, config.MODEL.LABEL_SMOOTHING),
        precision=precision,
        num_updates=config.TRAIN.START_EPOCH * order.updates_per_epoch,
    )

    # ----------------------------------------------------------------------------------------------------------- resume
    progress = Progress(next_epoch=config.TRAIN.START_EPOCH)
    if resume_path:
        progress = restore(resume_path, trainer, order.updates_per_epoch, logger)
    if processes.is_main:
        write_config(folder, config)
    board = TensorBoard(folder, processes.is_main, trainer.num_updates)
    logger.info(
        f"{config.MODEL.NAME}: {sum(p.numel() for p in network.parameters()):,} parameters, {precision}; learning rate "
        f"{rates.warmup:g} -> {rates.base:g} -> {rates.minimum:g} for global batch "
        f"{global_batch_size(config, processes.world_size)}: {config.DATA.BATCH_SIZE} images x {processes.world_size} "
        f"processes x {config.TRAIN.ACCUMULATION_STEPS} accumulated; {order.updates_per_epoch} updates an epoch"
    )

    # ------------------------------------------------------------------------------------------------------------- loop
    for epoch in range(progress.next_epoch, config.TRAIN.EPOCHS):
        order.set_position(epoch, progress.next_update)
        train_loss = train_one_epoch(
            config, trainer, train_loader, epoch, progress.next_update, processes, logger, board
        )

        networks = {"raw": network} | ({"ema": trainer.ema.module} if trainer.ema is not None else {})
        scalars = {"epoch/train_loss": train_loss}
        is_best = False
        for name, candidate in networks.items():
            share_running_statistics(candidate, processes)
            result = evaluate(
                candidate, val_loader, precision, processes, logger, config.PRINT_FREQ, title=f"Test ({name}): "
            )
            scalars |= {
                f"val_{name}/acc1": result.acc1,
                f"val_{name}/acc5": result.acc5,
                f"val_{name}/loss": result.loss,
            }
            is_best |= progress.record(result.acc1, name)
        logger.info(f"Max accuracy: {progress.max_accuracy:.3f}% ({progress.best_weights} weights)")
        board.scalars(scalars, trainer.num_updates)

        progress.next_epoch, progress.next_update = epoch + 1, 0
        if processes.is_main:
            save_epoch(config, folder, trainer, progress, epoch, processes.world_size, is_best)

    # ------------------------------------------------------------------------------------------------------------ close
    board.close()
    logger.info(
        f"{config.TRAIN.EPOCHS} epochs done: best Acc@1 {progress.max_accuracy:.3f} ({progress.best_weights} weights), "
        f"run folder {folder}"
    )


if __name__ == "__main__":
    run_script(main)
