"""What test.py does, and train.py with --eval, --throughput, --flops or --images."""

import json
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from configs import UserError
from data import usable_workers
from utils.checkpoint import find_weights
from utils.evaluation import check_results_folders
from utils.files import check_json_target, write_file, write_json, write_rows
from utils.precision import build_precision, unusual_precision
from utils.processes import run_on_main_and_broadcast
from utils.resume import check_same_everywhere
from utils.session import Session

from .coco import CocoSplit
from .images import EvalImages
from .inference import Result, flatten, predict
from .keys import KEYS
from .measurement import report_flops, report_throughput
from .metrics import NUMBERS, Scores, kinds_of, results_of_kind, score
from .pictures import draw_pictures
from .report import write_report
from .task import categories_of, check_settings, eval_loader, numbers_of, open_checked, summary
from .weights import load_detector

RESULT_FILES = {"box": "predictions.json", "mask": "predictions_masks.json"}  # COCO's results format


def evaluate(session: Session) -> None:
    """Do what the command line asks for."""
    check_json_target(session.args.json)
    check_settings(session.config)
    if session.args.flops:
        report_flops(session)
    elif session.config.THROUGHPUT_MODE:
        report_throughput(session)
    elif session.args.images:
        draw_pictures(session)
    else:
        evaluate_weights(session)


def evaluate_weights(session: Session) -> dict[str, Any]:
    """Evaluate given weights on the validation images; logs and writes the numbers, and returns them everywhere."""
    config, processes, logger = session.config, session.processes, session.logger
    path = find_weights(config)
    split = open_checked(session, "val")
    check_same_everywhere(session, {"val_fingerprint": split.digest})
    network, known, loaded = load_detector(config, path, list(split.categories.values()))
    network = network.to(processes.device)
    categories = categories_of(split, known["classes"])
    precision = build_precision(config, processes.device)
    logger.info(f"evaluating {loaded}")
    logger.info(
        f"{len(split)} images, {split.num_objects} objects of {len(known['classes'])} classes, {precision}, "
        f"{usable_workers(config)} workers"
    )
    folder = session.folder / "evaluation" / folder_name(config, path, split, processes.device)
    run_on_main_and_broadcast(lambda: check_results_folders([folder], path), processes)
    results = predict(session, network, split, eval_loader(session, EvalImages(split, config)), precision, categories)
    about = {
        "weights": loaded,
        "file": str(Path(path).resolve()),
        "model": config.MODEL.NAME,
        "detector": config.MODEL.DETECTOR,
        "data": str(split.path),
        "images": len(split),
        "objects": split.num_objects,
        "min_size": config.TEST.MIN_SIZE,
        "max_size": config.TEST.MAX_SIZE,
        "precision": str(precision),
    }
    content = run_on_main_and_broadcast(lambda: _conclude(session, split, results, about, folder), processes)
    if session.args.json and processes.is_main:
        write_json(session.args.json, content)
    logger.info(summary(content))
    return content


def folder_name(config: CfgNode, weights: str, split: CocoSplit, device: torch.device) -> str:
    """The folder of an evaluation: what was evaluated, on what, and how."""
    test = config.TEST
    parts = [Path(weights).stem, Path(config.DATA.DATA_PATH).resolve().name, split.path.stem]
    parts += [test.WEIGHTS] * (test.WEIGHTS != "best")
    parts += [str(test.MIN_SIZE)]
    parts += [f"to{test.MAX_SIZE}"] * (KEYS["TEST.MAX_SIZE"].default != test.MAX_SIZE)
    parts += [f"top{test.MAX_DETECTIONS}"] * (KEYS["TEST.MAX_DETECTIONS"].default != test.MAX_DETECTIONS)
    return "-".join(parts + unusual_precision(config, device))


def _conclude(
    session: Session, split: CocoSplit, results: list[list[Result]], about: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Compute, log and write what follows from the results; on the main process."""
    every = flatten(results)
    scores = {kind: score(split, every, kind) for kind in kinds_of(session.config.MODEL.DETECTOR)}
    numbers = numbers_of(scores)
    for kind in scores:
        session.logger.info(f"{kind:5}" + "".join(f"{name.replace('_', ' '):>10}" for name in NUMBERS))
        session.logger.info(f"{'%':5}" + "".join(f"{numbers[f'{kind}_{name}']:10.2f}" for name in NUMBERS))
    content = {**about, "detections": len(every), **numbers}
    for kind in scores:
        lines = ",\n".join(json.dumps(result, separators=(",", ":")) for result in results_of_kind(every, kind))
        write_file(f"[{lines}]\n".encode(), folder / RESULT_FILES[kind])
    try:
        _write_classes(folder / "per_class.csv", split, scores)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    write_json(str(folder / "metrics.json"), content)
    write_report(folder, split, results, content, scores, session.config.TEST.DRAW_SCORE)
    session.logger.info(f"results in COCO's format, numbers, classes and a page of pictures are in {folder}")
    return content


def _write_classes(path: Path, split: CocoSplit, scores: dict[str, Scores]) -> None:
    names = [f"{kind}_{name}" for kind in scores for name in ("ap", "ap50", "ar100")]
    rows = []
    for category, name in split.categories.items():
        values = [value for each in scores.values() for value in each.by_class[category]]
        # NaN, of a class without objects, is an empty field.
        rows.append([name, category, split.counts[category], *(f"{v:.4f}" if v == v else "" for v in values)])
    write_rows(path, ["class", "category_id", "objects", *names], rows)
