"""What test.py does, and train.py with --eval, --throughput or --flops."""

import math
from pathlib import Path

from yacs.config import CfgNode

from configs import UserError, with_num_classes
from data import build_eval_loader, check_val_classes, open_split, usable_workers
from models import build_model

from .checkpoint import load_weights
from .engine import Evaluation, build_precision, evaluate, measure_throughput
from .flops import count_flops
from .logging import peak_memory_mib
from .session import Session

PRETRAINED_FOLDER = Path(__file__).resolve().parent.parent / "pretrained"


def run_evaluation(session: Session) -> None:
    """Do what the command line asks for."""
    if session.args.flops:
        report_flops(session)
    elif session.config.THROUGHPUT_MODE:
        report_throughput(session)
    else:
        evaluate_weights(session)


def find_weights(config: CfgNode) -> str:
    """The file to evaluate: --resume, else --pretrained (MODEL.PRETRAINED), else pretrained/<MODEL.NAME>.pth.

    Raises UserError where there is none: a score of random weights would look like a result.
    """
    released = PRETRAINED_FOLDER / f"{config.MODEL.NAME}.pth"
    for path in (config.MODEL.RESUME, config.MODEL.PRETRAINED):
        if path:
            return path
    if released.is_file():
        return str(released)
    raise UserError(
        f"no weights to evaluate: give a file with --resume or --pretrained, or put released weights at {released}"
    )


def evaluate_weights(session: Session) -> Evaluation:
    """Exact top-1 and top-5 accuracy and loss of given weights on the validation images; logged, and returned."""
    config, processes, logger = session.config, session.processes, session.logger
    weights = find_weights(config)
    source = open_split(config, "val", processes.rank, processes.world_size)
    check_val_classes(config, None, source)
    config = with_num_classes(config, len(source.classes))

    network = build_model(config).to(processes.device)
    logger.info(f"evaluating {load_weights(network, weights, config.TEST.WEIGHTS)}")
    precision = build_precision(config, processes.device)
    loader = build_eval_loader(
        config, source, processes.rank, processes.world_size, pin_memory=processes.device.type == "cuda"
    )
    logger.info(
        f"{len(source.samples)} images of {len(source.classes)} classes, {precision}, {usable_workers(config)} workers"
    )
    result = evaluate(session, network, loader, precision)
    if not math.isfinite(result.loss):
        raise UserError(f"{weights}: gives outputs that are not finite; the weights or AMP_DTYPE are at fault")
    return result


def report_throughput(session: Session) -> None:
    """Log images/s and peak memory of the evaluation forward pass on random images; needs neither data nor weights."""
    config, device = session.config, session.processes.device
    network = build_model(config).to(device)
    precision = build_precision(config, device)
    speed = measure_throughput(network, _input_shape(config), config.DATA.BATCH_SIZE, precision, device)
    session.logger.info(
        f"batch size {config.DATA.BATCH_SIZE}, {config.DATA.IMG_SIZE} x {config.DATA.IMG_SIZE}, {precision}: "
        f"throughput {speed:.1f} images/s, peak memory {peak_memory_mib(device):.0f} MiB"
    )


def report_flops(session: Session) -> None:
    """Log FLOPs and parameters, by module and in all; needs neither data nor weights."""
    config = session.config
    flops, parameters, table = count_flops(build_model(config), _input_shape(config))
    session.logger.info(table)
    session.logger.info(
        f"{config.MODEL.NAME} at {config.DATA.IMG_SIZE} x {config.DATA.IMG_SIZE}: {flops / 1e9:.3f} GFLOPs, "
        f"{parameters:,} parameters"
    )


def _input_shape(config: CfgNode) -> tuple[int, int, int]:
    return config.MODEL.GMA.IN_DIM, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE
