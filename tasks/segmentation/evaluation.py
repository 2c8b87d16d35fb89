"""What test.py does, and train.py with --eval, --throughput, --flops or --images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from configs import UserError, with_num_classes
from data import usable_workers
from tasks.measurement import measure_throughput
from utils.checkpoint import find_weights
from utils.evaluation import check_results_folders
from utils.files import check_json_target, write_json
from utils.precision import build_precision, unusual_precision
from utils.processes import gather_on_main, run_on_main_and_broadcast
from utils.resume import check_same_everywhere
from utils.run_log import peak_memory_mib
from utils.session import Session

from .folders import MaskedImages, check_first_masks, fingerprint, open_masks
from .inference import confusion_of, evaluation_loader
from .keys import KEYS
from .metrics import summarize
from .network import Segmenter
from .outputs import write_outputs
from .pictures import segment_pictures
from .weights import load_segmenter


def evaluate(session: Session) -> None:
    """Do what the command line asks for."""
    check_json_target(session.args.json)
    if session.args.flops:
        report_flops(session)
    elif session.config.THROUGHPUT_MODE:
        report_throughput(session)
    elif session.args.images:
        segment_pictures(session, find_weights(session.config))
    else:
        evaluate_weights(session)


def evaluate_weights(session: Session) -> dict[str, Any]:
    """Evaluate given weights on the validation images; logs and writes the numbers, and returns them everywhere."""
    config, processes, logger = session.config, session.processes, session.logger
    weights = find_weights(config)
    images = open_masks(config, "val")
    check_first_masks(images)
    check_same_everywhere(session, {"val_fingerprint": fingerprint(images)})
    network, classes, loaded = load_segmenter(config, weights, images.classes, logger.warning)
    config = with_num_classes(config, len(classes))
    network.to(processes.device)
    precision = build_precision(config, processes.device)
    logger.info(f"evaluating {loaded}")
    logger.info(
        f"{len(images)} images of {len(classes)} classes, {precision}, {usable_workers(config)} workers; "
        f"{' and '.join(_how(config))}"
    )
    folder = session.folder / "evaluation" / folder_name(config, weights, processes.device)
    run_on_main_and_broadcast(lambda: check_results_folders([folder], weights), processes)

    rows: list[Tensor] = []  # of each image: correct pixels, pixels that count, its mIoU

    def keep(index: int, predicted: Tensor, of_image: Tensor) -> None:
        numbers = summarize(of_image.cpu())
        rows.append(torch.tensor([of_image.diag().sum(), of_image.sum(), numbers.miou], dtype=torch.float64))
        if config.TEST.SAVE_MASKS:
            _save_mask(folder / "masks", images, index, predicted)

    confusion = confusion_of(session, config, network, evaluation_loader(config, images, processes), precision, keep)
    shares = [range(rank, len(images), processes.world_size) for rank in range(processes.world_size)]
    own = torch.stack(rows) if rows else torch.empty(0, 3, dtype=torch.float64)
    gathered = gather_on_main(own, [len(share) for share in shares], processes)

    def conclude() -> dict[str, Any]:
        order = torch.tensor([index for share in shares for index in share])
        by_image = torch.empty_like(gathered).index_copy_(0, order, gathered)
        windows = ("WINDOW", "STRIDE") if config.TEST.MODE == "slide" else ()
        about = {
            "weights": loaded,
            "file": str(Path(weights).resolve()),
            "model": config.MODEL.NAME,
            "data": config.DATA.DATA_PATH,
            "short_side": config.DATA.IMG_SIZE,
            "max_long_side": config.DATA.MAX_LONG_SIDE,
            **{key.lower(): config.TEST[key] for key in ("MODE", *windows, "SCALES", "FLIP", "ABSENT_CLASSES")},
            "precision": str(precision),
        }
        return write_outputs(folder, config, network, precision, images, confusion, by_image, about)

    summary = run_on_main_and_broadcast(conclude, processes)
    logger.info(f"numbers, classes, confusion and report.html are in {folder}")
    if session.args.json and processes.is_main:
        write_json(session.args.json, summary)
    logger.info(f" * {summarize(confusion, config.TEST.ABSENT_CLASSES).line()}")
    return summary


def _save_mask(folder: Path, images: MaskedImages, index: int, predicted: Tensor) -> None:
    """Save a prediction under its mask's name, with the values of the data set's masks (ADE20K's server wants these).

    A folder of cities, as Cityscapes has, is kept.
    """
    path = folder / images.mask_name(index)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        images.to_mask(predicted.cpu().numpy()).save(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _how(config: CfgNode) -> list[str]:
    """How the images are predicted, in words."""
    test = config.TEST
    window = " x ".join(map(str, test.WINDOW))
    parts = ["whole images" if test.MODE == "whole" else f"windows of {window}"]
    parts += [f"scales {', '.join(f'{x:g}' for x in test.SCALES)}"] * (list(test.SCALES) != [1.0])
    return parts + ["mirrored"] * test.FLIP


def folder_name(config: CfgNode, weights: str, device: torch.device) -> str:
    """The folder of an evaluation: what was evaluated, on what, and how."""
    data, test = config.DATA, config.TEST
    parts = [Path(weights).stem, Path(data.DATA_PATH).resolve().name]
    parts += [folder.strip("/").replace("/", "_") for folder in (data.VAL_IMAGES, data.VAL_MASKS) if folder]
    parts += [test.WEIGHTS] * (test.WEIGHTS != "best")
    parts += [str(data.IMG_SIZE)]
    parts += [f"to{data.MAX_LONG_SIDE}"] * (KEYS["DATA.MAX_LONG_SIDE"].default != data.MAX_LONG_SIDE)
    parts += ["slide", *("x".join(map(str, size)) for size in (test.WINDOW, test.STRIDE))] * (test.MODE == "slide")
    parts += ["x".join(f"{x:g}" for x in test.SCALES)] * (list(test.SCALES) != [1.0])
    parts += ["flip"] * test.FLIP
    parts += ["absent_zero"] * (test.ABSENT_CLASSES == "zero")
    return "-".join(parts + unusual_precision(config, device))


# ---------------------------------------------------------------------------------------------------------- measurement
def count_multiply_adds(network: torch.nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """Multiply-adds of one image of this height and width, in evaluation mode: {'': in all, 'backbone': ..., ...}.

    torch's counter, which counts a multiply-add twice, halved. On the device `meta` nothing is computed.
    """
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, *size, device=next(network.parameters()).device))
    counts = counter.get_flop_counts()
    root = type(network).__name__
    parts = {name: sum(counts.get(f"{root}.{name}", {}).values()) // 2 for name, _ in network.named_children()}
    return {"": counter.get_total_flops() // 2, **{name: count for name, count in parts.items() if count}}


def report_flops(session: Session) -> None:
    """Log FLOPs and parameters of what evaluates: without the auxiliary head."""
    config = session.config
    height, width = config.TEST.MEASURE
    network = Segmenter(config, auxiliary=False)
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in network.named_children()}
    counts = count_multiply_adds(network.to("meta"), (height, width))
    for name, count in counts.items():
        if name:
            session.logger.info(f"{name:9} {count / 1e9:8.1f} GFLOPs {parameters[name]:12,} parameters")
    total = sum(parameters.values())
    session.logger.info(
        f"{config.MODEL.NAME} at {height} x {width}, {config.MODEL.GMA.NUM_CLASSES} classes: {counts[''] / 1e9:.1f} "
        f"GFLOPs (one multiply-add is one), {total:,} parameters"
    )
    _write(session, {"num_classes": config.MODEL.GMA.NUM_CLASSES, "flops": counts[""], "parameters": total})


def report_throughput(session: Session) -> None:
    """Log images/s and peak memory of the evaluation forward pass on random images, one at a time as test.py does."""
    config, device = session.config, session.processes.device
    height, width = config.TEST.MEASURE
    precision = build_precision(config, device)
    steps = {"warmup_steps": 10, "steps": 30} if device.type == "cuda" else {"warmup_steps": 1, "steps": 3}
    network = Segmenter(config, auxiliary=False).to(device)
    speed = measure_throughput(network, (3, height, width), 1, precision, device, **steps)
    memory = peak_memory_mib(device)
    session.logger.info(
        f"batch size 1, {height} x {width}, {precision}: throughput {speed:.2f} images/s, peak memory {memory:.0f} MiB"
    )
    content = {"batch_size": 1, "precision": str(precision), "device": str(device), "images_per_second": speed}
    _write(session, content | {"peak_memory_mib": memory})


def _write(session: Session, content: dict[str, Any]) -> None:
    if session.args.json and session.processes.is_main:
        size = list(session.config.TEST.MEASURE)
        write_json(session.args.json, {"model": session.config.MODEL.NAME, "image_size": size} | content)
