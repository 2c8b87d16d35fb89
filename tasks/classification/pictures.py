"""`test.py --images`: the most probable classes of pictures that nobody has labelled."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm
from yacs.config import CfgNode

from configs import UserError
from configs.text import printable
from data import ImageDataset, usable_workers
from data.sources import UNLABELLED, PictureSource
from data.workers import init_worker
from tasks.networks import inference_network
from utils.files import write_json
from utils.precision import build_precision
from utils.session import Session

from .inference import predict_batch, summarize_batch
from .transforms import views_transform
from .weights import load_classifier

SUFFIX = ".top5.json"  # after the whole name of the picture: a.jpg and a.png do not share a file


class _Pictures(Dataset):
    """Views (views, 3, H, W) of each picture, or the line that says why there are none."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.images[index][0]
        except UserError as error:
            return index, error.one_line()


def label_pictures(session: Session, weights: str) -> None:
    """Print the top-5 of every picture and write them to <picture>.top5.json in its folder.

    The number of classes is that of the weights. Pictures that cannot be read, and folders that cannot be written to,
    are named; the others go on, and the process ends with status 1 (SystemExit).
    Raises UserError where a path does not exist, or a folder holds no picture.
    """
    config, processes, logger = session.config, session.processes, session.logger
    if processes.distributed:
        raise UserError("--images works on one process: start test.py without torchrun")
    paths = find_pictures(session.args.images)
    network, names, loaded = load_classifier(config, weights)
    network = inference_network(config, network.to(processes.device))
    if config.DATA.FAST_LOADING == "all":
        logger.info("DATA.FAST_LOADING does not apply to --images: pictures are resized exactly")
    precision = build_precision(config, processes.device)
    logger.info(f"{len(paths)} pictures, {loaded}, {len(names)} classes, {precision}")

    about = {"weights": loaded, "image_size": config.DATA.IMG_SIZE, "tta": config.TEST.TTA}
    results, faults = [], 0
    for path, views in tqdm(_views_of_each(config, paths), total=len(paths), unit="picture", disable=None, leave=False):
        result: dict[str, Any] = {"picture": str(path)}
        if isinstance(views, str):
            logger.error(printable(views))
            results.append(result | {"error": views})
            faults += 1
            continue
        logits = predict_batch(network, views[None].to(processes.device), precision, config)
        batch = summarize_batch(logits, torch.full((1,), UNLABELLED, device=logits.device))
        result["top"] = [
            {"class": index, "name": names[index], "probability": float(f"{probability:.6g}")}
            for index, probability in zip(batch["top"][0].tolist(), batch["top_probabilities"][0].tolist())
        ]
        logger.info(printable(str(path)))
        for entry in result["top"]:
            logger.info(f"    {100 * entry['probability']:6.2f} %  {entry['name']}")
        results.append(result)
        try:
            write_json(f"{path}{SUFFIX}", about | result)
        except UserError as error:
            logger.error(printable(error.one_line()))
            faults += 1
    if session.args.json:
        write_json(session.args.json, {**about, "pictures": results})
    if faults:
        logger.error(f"{faults} of {len(paths)} pictures: see above")
        raise SystemExit(1)


def find_pictures(arguments: Sequence[str]) -> list[Path]:
    """The files that are named, whatever their names, and the images anywhere below the folders that are named.

    Sorted within a folder; hidden files and folders are passed over. UserError where something is not there.
    """
    pictures: dict[Path, None] = {}  # each once, in order
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            below = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in IMG_EXTENSIONS
                and not any(part.startswith(".") for part in file.relative_to(path).parts)
            )
            if not below:
                raise UserError(f"--images {argument}: holds no pictures ({', '.join(IMG_EXTENSIONS)})")
            pictures |= dict.fromkeys(below)
        elif path.is_file():
            pictures[path] = None
        else:
            raise UserError(f"--images {argument}: no such file or folder")
    return list(pictures)


def _views_of_each(config: CfgNode, paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor | str]]:
    """Each picture with its views or what is wrong with it, in order; decoded by the loader's workers."""
    images = ImageDataset(PictureSource(paths), views_transform(config))
    workers = min(usable_workers(config), len(paths) - 1)
    for index, views in DataLoader(_Pictures(images), batch_size=None, num_workers=workers, worker_init_fn=init_worker):
        yield paths[index], views
