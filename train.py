"""Train a network, on one process or many. The key TASK says what for: classification by default.

python train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
"""

import dataclasses

from timm.utils import ModelEmaV3

import tasks
from configs.errors import StopRequested
from tools.curves import RunCurves
from utils.engine import LoopState, TrainState, train_one_epoch, validate
from utils.failures import exit_stopped
from utils.optimizer import build_optimizer
from utils.precision import build_precision, build_scaler
from utils.processes import broadcast_batchnorm_stats, wrap_distributed
from utils.resume import (
    Saver,
    check_same_everywhere,
    identify_data,
    keep_what_followed,
    load_resume,
    quarantine_checkpoints,
    restore,
)
from utils.run_log import EpochLog, TensorBoard
from utils.schedule import build_scheduler, global_batch_size, run_length, scaled_learning_rates, unusual_settings
from utils.session import RunFolder, describe_run, run_script, start_session


def main(run_folder: RunFolder | None = None) -> None:
    # ------------------------------------------------------------------------ configuration, processes, run folder, log
    session = start_session(__doc__, tasks.keys_of, run_folder, may_train=True)
    if not session.trains:
        tasks.evaluate(session)
        return
    session.supervisor.listen()

    # ------------------------------------------------------------------------------- the task: data, network, loss, ...
    task = tasks.build(session)
    session = dataclasses.replace(session, config=task.config)
    identity = identify_data(session, task)
    check_same_everywhere(session, identity)
    resume_path, checkpoint = load_resume(session)
    session = keep_what_followed(session, checkpoint)
    config, processes, folder, logger = session.config, session.processes, session.folder, session.logger
    logger.info(task.about)
    if config.MODEL.PRETRAINED and checkpoint is None:
        logger.info(f"starting from {task.load_pretrained(config.MODEL.PRETRAINED)}")

    # ------------------------------------------------------------------------------ optimizer, schedule, precision, EMA
    network, length = task.network, run_length(config, task.data.updates_per_epoch)
    rates = scaled_learning_rates(config, processes.world_size)
    model = wrap_distributed(network, processes)
    optimizer = build_optimizer(config, network, rates.base)
    precision = build_precision(config, processes.device)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, rates, length),
        scaler=build_scaler(precision),
        ema=ModelEmaV3(network, decay=config.EMA.DECAY, use_warmup=config.EMA.WARMUP) if config.EMA.ENABLED else None,
        precision=precision,
        length=length,
        num_updates=config.TRAIN.START_EPOCH * length.updates_per_epoch,
    )
    if config.COMPILE:
        task.compile(precision)  # after the average, which is a copy

    # ----------------------------------------------------------------------------------------------------------- resume
    loop = LoopState(next_epoch=config.TRAIN.START_EPOCH)
    if checkpoint is not None:
        loop = restore(session, resume_path, checkpoint, state, identity)
        del checkpoint  # as large as the network, its average and the optimizer together
    if processes.is_main:
        quarantine_checkpoints(session, resume_path, loop)
        describe_run(config, folder)
    saver = Saver(session, state, loop, identity)
    board = TensorBoard(folder, processes.is_main, state.num_updates)
    epochs = EpochLog(folder, processes.is_main, loop.next_epoch if resume_path else 0)
    curves = RunCurves(folder, processes.is_main, logger)
    logger.info(
        f"{config.MODEL.NAME}: {sum(p.numel() for p in network.parameters()):,} parameters, {precision}; learning rate "
        f"{rates.base:g} (warm-up from {rates.warmup:g}, minimum {rates.minimum:g}) for global batch "
        f"{global_batch_size(config, processes.world_size)}: {config.DATA.BATCH_SIZE} images x {processes.world_size} "
        f"processes x {config.TRAIN.ACCUMULATION_STEPS} accumulated; {length.updates_per_epoch} updates per epoch, "
        f"{length.updates} in all, {length.warmup_updates} of warm-up"
    )
    for line in unusual_settings(config, processes.world_size, length):
        logger.warning(line)

    # ------------------------------------------------------------------------------------------------------------- loop
    networks = {"raw": network} | ({"ema": state.ema.module} if state.ema is not None else {})
    try:
        with session.supervisor.explain_lost_ranks():
            if session.supervisor.stop_agreed():  # during all of the above
                raise StopRequested
            for epoch in range(loop.next_epoch, length.epochs):
                numbers = train_one_epoch(session, state, loop, task, board, saver.after_update)
                results = {}
                validates = (epoch + 1) % config.TRAIN.VAL_FREQ == 0 or length.is_last(epoch)
                with saver.save_epoch_on_error():
                    for weights, candidate in networks.items() if validates else ():
                        logger.info(f"validating the {weights} weights")
                        broadcast_batchnorm_stats(candidate, processes)
                        results[weights] = validate(task, candidate)
                        numbers_of_weights = ", ".join(f"{n} {value:.4g}" for n, value in results[weights].items())
                        logger.info(f"{weights} weights: {numbers_of_weights}")
                is_best = loop.record({w: r[task.decides] for w, r in results.items()}, task.higher_is_better)
                if validates:
                    logger.info(f"Best {task.decides}: {loop.best_so_far}")
                validation = {f"{name}_{w}": value for w, r in results.items() for name, value in r.items()}
                judged_by = {"decides": task.decides, "higher_is_better": task.higher_is_better}
                epochs.append(numbers | validation | judged_by)
                board.epoch(numbers["train_loss"], validation, state.num_updates)
                curves.after_epoch()
                loop.begin_epoch(epoch + 1)
                saver.after_epoch(epoch, is_best)
    except StopRequested:
        done = saver.stop()
        logger.info(f"stopped by request at update {state.num_updates}, {done}; the same command continues")
        exit_stopped()
    finally:
        board.close()
        curves.draw()

    # ------------------------------------------------------------------------------------------------------------ close
    logger.info(f"{length} done: best {task.decides} {loop.best_so_far}, run folder {folder}")
    if task.by_chance is not None and not (loop.best_weights and loop.best > task.by_chance):
        logger.warning(
            f"best {task.decides} {loop.best:.3f}: guessing may reach {task.by_chance:.3f} on so many images, so "
            "nothing shows that the network has learnt; look at the learning rate and its warm-up, and check the data "
            "with python -m tools.check"
        )


if __name__ == "__main__":
    run_script(main)
