"""What test.py does, and train.py with --eval, --throughput, --flops or --images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from configs import image_size, with_num_classes, with_values
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

from . import multi_label, single_label
from .images import holds_out, open_for_evaluation
from .pictures import label_pictures
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

    Returns one dictionary per size; keys as in `summarize`, or `multi_label.evaluate`; the same on every process. The
    last line logged is ` * Acc@1 ... Acc@5 ...` or ` * mAP ...`, of the last size.
    """
    config, processes = session.config, session.processes
    weights = find_weights(config)
    config, network, images, loaded = _open(session, weights)
    precision = build_precision(config, processes.device)
    session.logger.info(
        f"{len(images.source.samples)} images of {len(images.source.classes)} classes, {precision}, "
        f"{usable_workers(config)} workers"
    )
    sizes = config.TEST.SIZES or [config.DATA.IMG_SIZE]
    sized_configs = [with_values(config, {"DATA.IMG_SIZE": size}) for size in sizes]
    folders = [session.folder / "evaluation" / _name(sized, weights, processes.device) for sized in sized_configs]
    run_on_main_and_broadcast(lambda: check_results_folders(folders, weights), processes)
    kind = multi_label if config.DATA.MULTI_LABEL else single_label
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
        results.append(kind.evaluate(session, sized, network, images, precision, about, folder, title))
    if len(results) > 1:
        for line in _table(results, kind.TABLE):
            session.logger.info(line)
    if session.args.json and processes.is_main:
        write_json(session.args.json, results if config.TEST.SIZES else results[0])
    session.logger.info(kind.last_line(results[-1]))
    return results


def _open(session: Session, weights: str) -> tuple[CfgNode, nn.Module, ValidationSet, str]:
    """The configuration for as many classes as there are, network, images, and what was loaded into the network."""
    config, logger = session.config, session.logger
    read = read_weights(weights, config.TEST.WEIGHTS)
    trained_on = read.checkpoint.get("classes")
    images = _open_images(session, trained_on if isinstance(trained_on, list) else [])
    classes, found = images.source.classes, fingerprint(images.source)
    check_same_everywhere(session, {"val_fingerprint": found})
    if holds_out(config) and read.checkpoint.get("val_fingerprint", found) != found:
        logger.warning(
            f"{config.DATA.DATA_PATH}: the images that DATA.VAL_SHARE holds out are not those of the run; {weights} "
            "may have been trained on some of them, so accuracies may be too high"
        )
    val_set = config.TEST.VAL_SET
    present = len({label for _, label in images.source.samples})
    if val_set and present < len(classes):
        logger.warning(
            f"only {present} of the {len(classes)} classes of ImageNet's set {val_set!r} are in "
            f"{config.DATA.DATA_PATH}: numbers are over these, and mean nothing where it is another data set"
        )
    config = with_num_classes(config, NUM_CLASSES if val_set else len(classes))
    network = build_model(config).to(session.processes.device)
    load_weights(network, read, weights, [] if val_set else classes, logger.warning)
    logger.info(f"evaluating {read.about}")
    return config, inference_network(config, network), images, read.about


def _table(rows: list[dict[str, Any]], columns: Sequence[tuple[str, str, int]]) -> Iterator[str]:
    """A line for each size; columns are a title, a key and the number of decimals."""
    yield " ".join(["size".rjust(5), *(title.rjust(8) for title, _, _ in columns)])
    for row in rows:
        yield " ".join([f"{row['image_size']:5d}", *(f"{row[key]:8.{decimals}f}" for _, key, decimals in columns)])


def _open_images(session: Session, trained_on: list[str]) -> ValidationSet:
    """The validation images of the data set, or those of ImageNet's other set that TEST.VAL_SET names."""
    if session.config.TEST.VAL_SET:
        return open_validation_set(session.config)
    return ValidationSet(open_for_evaluation(session.config, trained_on, session.logger.warning), None, None)


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
