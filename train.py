"""Train a GroupMixFormer, on one process or many.

python train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
"""

import dataclasses

import torch
from timm.utils import ModelEmaV3

from configs import with_num_classes
from data import TrainingData, build_eval_loader, check_val_classes, open_split, usable_workers
from models.cpu.depthwise import use_fast_gradients
from tasks.classification.evaluate import run_evaluation
from tasks.classification.transforms import build_mixup
from tasks.classification.weights import load_pretrained
from tasks.networks import build_model
from tools.curves import RunCurves
from utils.engine import (
    Progress,
    Trainer,
    build_criterion,
    build_precision,
    build_scaler,
    compile_for_training,
    evaluate,
    train_one_epoch,
)
from utils.optimizer import build_optimizer
from utils.processes import share_running_statistics, wrap_distributed
from utils.resume import Saver, check_same_everywhere, identify_images, load_resume, restore, set_rest_aside
from utils.run_log import TensorBoard
from utils.schedule import build_scheduler, global_batch_size, scaled_learning_rates
from utils.session import RunFolder, describe_run, run_script, start_session
from utils.supervision import StopRequested, exit_stopped, quiet_loader_worker


def main(run_folder: RunFolder | None = None) -> None:
    # ------------------------------------------------------------------------ configuration, processes, run folder, log
    session = start_session(__doc__, run_folder, may_train=True)
    config, processes, folder, logger = session.config, session.processes, session.folder, session.logger
    if not session.trains:
        run_evaluation(session)
        return
    session.watch.listen()

    # ------------------------------------------------------------------------------------------------------------- data
    share = (processes.rank, processes.world_size)
    train_source, val_source = open_split(config, "train", *share), open_split(config, "val", *share)
    check_val_classes(config, train_source, val_source)
    config = with_num_classes(config, len(train_source.classes))
    session = dataclasses.replace(session, config=config)
    pin_memory = processes.device.type == "cuda"
    samples_log = folder / f"samples_rank{processes.rank}.txt" if config.LOG_SAMPLES else None
    data = TrainingData(
        config, train_source, *share, pin_memory, logger.warning, quiet_loader_worker, samples_log=samples_log
    )
    val_loader = build_eval_loader(config, val_source, *share, pin_memory, quiet_loader_worker)
    images = identify_images(config, data, val_source, processes.world_size)
    check_same_everywhere(session, images)
    mixup = build_mixup(config)
    logger.info(
        f"{len(train_source.samples)} training and {len(val_source.samples)} validation images of "
        f"{len(train_source.classes)} classes, {usable_workers(config)} loader workers per process"
    )

    # ------------------------------------------------------------------------------------------------------------ model
    torch.manual_seed(config.SEED + processes.rank)
    network = build_model(config).to(processes.device)
    if processes.device.type == "cpu":
        use_fast_gradients(network)
    resume_path, state = load_resume(session)
    if config.MODEL.PRETRAINED and state is None:
        pretrained, class_map = config.MODEL.PRETRAINED, config.MODEL.CLASS_MAP
        logger.info(f"starting from {load_pretrained(network, pretrained, class_map, train_source.classes)}")
    model = wrap_distributed(network, processes, session.watch.notes)

    # ------------------------------------------------------------------------------ optimizer, schedule, precision, EMA
    rates = scaled_learning_rates(config, processes.world_size)
    optimizer = build_optimizer(config, network, rates.base)
    precision = build_precision(config, processes.device)
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, rates, data.updates_per_epoch),
        scaler=build_scaler(precision),
        ema=ModelEmaV3(network, decay=config.EMA.DECAY, use_warmup=config.EMA.WARMUP) if config.EMA.ENABLED else None,
        mixup=mixup,
        criterion=build_criterion(mixup, config.MODEL.LABEL_SMOOTHING),
        precision=precision,
        num_updates=config.TRAIN.START_EPOCH * data.updates_per_epoch,
    )

    if config.COMPILE:
        compile_for_training(network, precision)  # after the average, which is a copy

    # ----------------------------------------------------------------------------------------------------------- resume
    progress = Progress(next_epoch=config.TRAIN.START_EPOCH)
    if state is not None:
        progress = restore(session, resume_path, state, trainer, data.updates_per_epoch, images)
        del state  # as large as the network, its average and the optimizer together
    if processes.is_main:
        set_rest_aside(session, resume_path)
    saver = Saver(session, trainer, progress, images)
    board = TensorBoard(folder, processes.is_main, trainer.num_updates)
    curves = RunCurves(folder, processes.is_main, logger)
    if processes.is_main:
        describe_run(config, folder)
    logger.info(
        f"{config.MODEL.NAME}: {sum(p.numel() for p in network.parameters()):,} parameters, {precision}; learning rate "
        f"{rates.base:g} (warm-up from {rates.warmup:g}, minimum {rates.minimum:g}) for global batch "
        f"{global_batch_size(config, processes.world_size)}: {config.DATA.BATCH_SIZE} images x {processes.world_size} "
        f"processes x {config.TRAIN.ACCUMULATION_STEPS} accumulated; {data.updates_per_epoch} updates per epoch"
    )

    # ------------------------------------------------------------------------------------------------------------- loop
    networks = {"raw": network} | ({"ema": trainer.ema.module} if trainer.ema is not None else {})
    try:
        with session.watch.naming_lost_processes():
            if session.watch.stop_agreed():  # during all of the above
                raise StopRequested
            for epoch in range(progress.next_epoch, config.TRAIN.EPOCHS):
                train_loss = train_one_epoch(session, trainer, progress, data, board, saver.after_update)
                results = {}
                with saver.keeping_epoch():
                    for name, candidate in networks.items():
                        share_running_statistics(candidate, processes)
                        results[name] = evaluate(session, candidate, val_loader, precision, f"Test ({name}): ")
                is_best = False
                for name, result in results.items():
                    is_best |= progress.record(result.acc1, name)
                logger.info(f"Max accuracy: {progress.max_accuracy:.3f}% ({progress.best_weights} weights)")
                board.epoch(train_loss, results, trainer.num_updates)
                curves.after_epoch()
                progress.begin_epoch(epoch + 1)
                saver.after_epoch(epoch, is_best)
    except StopRequested:
        done = saver.stop()
        logger.info(f"stopped by request at update {trainer.num_updates}, {done}; the same command continues")
        exit_stopped()
    finally:
        board.close()
        curves.draw()

    # ------------------------------------------------------------------------------------------------------------ close
    logger.info(
        f"{config.TRAIN.EPOCHS} epochs done: best Acc@1 {progress.max_accuracy:.3f} ({progress.best_weights} weights), "
        f"run folder {folder}"
    )


if __name__ == "__main__":
    run_script(main)
