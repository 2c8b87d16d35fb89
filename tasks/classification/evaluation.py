"""What test.py does, and train.py with --eval, --throughput, --flops or --images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from configs import UserError, image_size, with_num_classes, with_values
from data import fingerprint, usable_workers
from tasks.measurement import report_flops, report_throughput
from tasks.networks import build_model, inference_network
from utils.checkpoint import find_weights
from utils.evaluation import check_results_folders
from utils.files import check_json_target, write_json
from utils.precision import build_precision, unusual_precision
from utils.processes import run_on_main_and_broadcast
from utils.resume import check_same_everywhere
from utils.session import Session

from . import multi_label
from .images import holds_out, open_for_evaluation
from .inference import predict
from .outputs import describe, summarize, write_outputs
from .pictures import label_pictures
from .predictions import Predictions
from .validation_sets import NUM_CLASSES, ValidationSet, open_validation_set
from .weights import load_weights, read_weights


def evaluate(session: Session) -> None:
    """Do what the command line asks for."""
    config, device = session.config, session.processes.device
    check_json_target(session.args.json)
    if config.MODEL.CLASS_MAP:
        session.logger.warning(f"MODEL.CLASS_MAP {config.MODEL.CLASS_MAP} is not used: training maps the head")
    if config.DATA.CLASS_NAMES and not session.args.images:
        session.logger.warning(f"--class-names {config.DATA.CLASS_NAMES} is not used: it is for --images")
    shape = (config.MODEL.GMA.IN_DIM, *image_size(config))
    if config.DATA.MULTI_LABEL:
        multi_label.check_evaluation(config)
    if session.args.flops:
        report_flops(session, build_model(config), shape, config.MODEL.GMA.NUM_CLASSES)
    elif config.THROUGHPUT_MODE:
        report_throughput(session, inference_network(config, build_model(config).to(device)), shape)
    elif session.args.images:
        label_pictures(session, find_weights(config))
    else:
        evaluate_weights(session)


def evaluate_weights(session: Session) -> list[dict[str, Any]]:
    """Evaluate given weights on the validation images, at one size or several; logs and writes the numbers.

    Returns one dictionary per size; keys as in `summarize`; the same on every process. The last line logged is
    ` * Acc@1 ... Acc@5 ...`, of the last size.
    """
    config, processes, logger = session.config, session.processes, session.logger
    weights = find_weights(config)
    read = read_weights(weights, config.TEST.WEIGHTS)
    trained_on = read.checkpoint.get("classes")
    images = _open_images(session, trained_on if isinstance(trained_on, list) else [])
    found = fingerprint(images.source)
    check_same_everywhere(session, {"val_fingerprint": found})
    if holds_out(config) and read.checkpoint.get("val_fingerprint", found) != found:
        logger.warning(
            f"{config.DATA.DATA_PATH}: the images that DATA.VAL_SHARE holds out are not those of the run; {weights} "
            "may have been trained on some of them, so accuracies may be too high"
        )
    num_outputs = NUM_CLASSES if config.TEST.VAL_SET else len(images.source.classes)
    config = with_num_classes(config, num_outputs)

    network = build_model(config).to(processes.device)
    classes = [] if config.TEST.VAL_SET else images.source.classes
    load_weights(network, read, weights, classes, logger.warning)
    loaded = read.about
    del read  # as large as the network, and with optimizer and average four times
    logger.info(f"evaluating {loaded}")
    network = inference_network(config, network)
    precision = build_precision(config, processes.device)
    logger.info(
        f"{len(images.source.samples)} images of {len(images.source.classes)} classes, {precision}, "
        f"{usable_workers(config)} workers"
    )
    present = len({label for _, label in images.source.samples})
    if config.TEST.VAL_SET and present < len(images.source.classes):
        logger.warning(
            f"only {present} of the {len(images.source.classes)} classes of ImageNet's set {config.TEST.VAL_SET!r} are "
            f"in {config.DATA.DATA_PATH}: numbers are over these, and mean nothing where it is another data set"
        )
    sizes = config.TEST.SIZES or [config.DATA.IMG_SIZE]
    sized_configs = [with_values(config, {"DATA.IMG_SIZE": size}) for size in sizes]
    folders = [session.folder / "evaluation" / _name(sized, weights, processes.device) for sized in sized_configs]
    run_on_main_and_broadcast(lambda: check_results_folders(folders, weights), processes)
    results: list[dict[str, Any]] = []
    for size, sized, folder in zip(sizes, sized_configs, folders):
        title = "Test: " if len(sizes) == 1 else f"Test ({size} x {size}): "
        about = {
            "weights": loaded,
            "file": str(Path(weights).resolve()),
            "model": config.MODEL.NAME,
            "data": config.DATA.DATA_PATH,
            "val_set": config.TEST.VAL_SET,
            "image_size": size,
            "crop": config.TEST.CROP,
            "tta": config.TEST.TTA,
            "precision": str(precision),
            "fused": config.TEST.FUSE,
            "compiled": config.COMPILE,
            "fast_loading": config.DATA.FAST_LOADING == "all",
        }
        if config.DATA.MULTI_LABEL:
            how = (precision, about, folder, title)
            results.append(multi_label.evaluate(session, sized, network, images.source, *how))
            continue
        predictions = predict(session, sized, network, images.source, precision, images.outputs, title)
        results.append(
            run_on_main_and_broadcast(
                lambda p=predictions, a=about, f=folder: _conclude(session, p, images, a, f), processes
            )
        )
    if len(results) > 1 and not config.DATA.MULTI_LABEL:
        logger.info(f"{'size':>5} {'Acc@1':>8} {'Acc@5':>8} {'NLL':>8} {'ECE':>7}")
        for row in results:
            numbers = f"{row['acc1']:8.3f} {row['acc5']:8.3f} {row['nll']:8.4f} {row['ece']:7.4f}"
            logger.info(f"{row['image_size']:5d} {numbers}")
    if session.args.json and processes.is_main:
        write_json(session.args.json, results if config.TEST.SIZES else results[0])
    last = results[-1]
    if config.DATA.MULTI_LABEL:
        logger.info(f" * mAP {last['map']:.3f}")
    else:
        logger.info(f" * Acc@1 {last['acc1']:.3f} Acc@5 {last['acc5']:.3f}")
    return results


def _open_images(session: Session, trained_on: list[str]) -> ValidationSet:
    """The validation images of the data set, or those of ImageNet's other set that TEST.VAL_SET names."""
    if session.config.TEST.VAL_SET:
        return open_validation_set(session.config)
    return ValidationSet(open_for_evaluation(session.config, trained_on, session.logger.warning), None, None)


def _conclude(
    session: Session, predictions: Predictions, images: ValidationSet, about: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Compute, log and write what follows from the predictions; on the main process."""
    if not np.isfinite(predictions.nll[predictions.labelled]).all():
        raise UserError(f"{about['weights']}: gives outputs that are not finite; the weights or AMP_DTYPE are at fault")
    summary = about | summarize(predictions, images.label_sets)
    for line in describe(summary):
        session.logger.info(line)
    try:
        write_outputs(folder, predictions, summary)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    session.logger.info(f"predictions, accuracy by class, confusion and metrics are in {folder}")
    return summary


def _name(config: CfgNode, weights: str, device: torch.device) -> str:
    """The folder of an evaluation: what was evaluated, on what, and how."""
    parts = [Path(weights).stem, config.TEST.VAL_SET or "val", Path(config.DATA.DATA_PATH).resolve().name]
    if config.TEST.WEIGHTS != "best":
        parts.insert(1, config.TEST.WEIGHTS)
    height, width = image_size(config)
    parts.append(str(height) if height == width else f"{height}x{width}")
    parts += [config.TEST.TTA] * (config.TEST.TTA != "none")
    parts += ["uncropped"] * (not config.TEST.CROP)
    parts += ["fused"] * config.TEST.FUSE
    parts += ["compiled"] * config.COMPILE
    parts += ["fast"] * (config.DATA.FAST_LOADING == "all")
    return "-".join(parts + unusual_precision(config, device))
