"""Train a network, on one process or many. The key TASK says what for: classification by default.

python train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer_small.yaml --data-path DIR
"""

import dataclasses

from timm.utils import ModelEmaV3

import tasks
from configs.errors import StopRequested
from tools.curves import RunCurves
from utils.engine import LoopState, TrainState, train_one_epoch, validate_all, warn_of_chance
from utils.failures import exit_stopped
from utils.optimizer import build_optimizer
from utils.precision import build_precision, build_scaler
from utils.processes import wrap_distributed
from utils.resume import (
    Saver,
    check_same_everywhere,
    identify_data,
    keep_what_followed,
    load_resume,
    quarantine_checkpoints,
    restore,
)
from utils.run_log import EpochLog, open_board
from utils.schedule import build_scheduler, report_recipe, run_length, scaled_learning_rates
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
    optimizer = build_optimizer(config, network, rates.base)
    precision = build_precision(config, processes.device)
    state = TrainState(
        model=wrap_distributed(network, processes),
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer, rates, length),
        scaler=build_scaler(precision),
        ema=ModelEmaV3(network, decay=config.EMA.DECAY, use_warmup=config.EMA.WARMUP) if config.EMA.ENABLED else None,
        precision=precision,
        length=length,
        num_updates=length.updates_before(config.TRAIN.START_EPOCH),
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
    board = open_board(config, folder, processes, state.num_updates, logger)
    epochs = EpochLog(folder, processes.is_main, loop.next_epoch if resume_path else 0)
    curves = RunCurves(folder, processes.is_main, logger)
    report_recipe(session, f"{sum(p.numel() for p in network.parameters()):,} parameters, {precision}", rates, length)

    # ------------------------------------------------------------------------------------------------------------- loop
    networks = {"raw": network} | ({"ema": state.ema.module} if state.ema is not None else {})
    try:
        with session.supervisor.explain_lost_ranks():
            if session.supervisor.stop_agreed():  # during all of the above
                raise StopRequested
            for epoch in range(loop.next_epoch, length.epochs):
                numbers = train_one_epoch(session, state, loop, task, board, saver.after_update)
                validates = (epoch + 1) % config.TRAIN.VAL_FREQ == 0 or length.is_last(epoch)
                with saver.save_epoch_on_error():
                    results = validate_all(session, task, networks) if validates else {}
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
    warn_of_chance(session, task, loop)


if __name__ == "__main__":
    run_script(main)
