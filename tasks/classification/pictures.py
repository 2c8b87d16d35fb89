"""`test.py --images`: the most probable classes of pictures that nobody has labelled."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from yacs.config import CfgNode

from configs import UserError
from configs.text import printable
from data import ImageDataset, usable_workers
from data.sources import PictureSource
from data.workers import init_worker
from tasks.networks import inference_network
from tasks.pictures import TOP5, find_pictures, one_process
from utils.checkpoint import some
from utils.files import check_folder, write_json, write_rows
from utils.precision import build_precision
from utils.session import Session

from .inference import TOP, class_probabilities, predict_batch
from .transforms import views_transform
from .weights import load_classifier

TABLE = "pictures.csv"  # a line for every picture: picture, top1, top1_name, p1, ..., top5, top5_name, p5, error


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
    """Print the top-5 of every picture and write them to one table, and to <picture>.top5.json in its folder.

    The table is <--out>/pictures.csv, and then nothing is written beside the pictures; without --out it is in the run
    folder, and what cannot be written beside a picture is in the table alone. The number of classes is that of the
    weights. Pictures that cannot be read are named; the others go on, and the process ends with status 1 (SystemExit).
    Raises UserError where a path does not exist, a folder holds no picture, or the table cannot be written.
    """
    config, processes, logger = session.config, session.processes, session.logger
    one_process(session)
    paths = find_pictures(session.args.images, logger.info)
    out = session.args.out
    table = Path(out) / TABLE if out else session.folder / "evaluation" / f"{Path(weights).stem}-{TABLE}"
    check_folder(table.parent, table.name)
    closed = {path.parent for path in paths if out or not os.access(path.parent, os.W_OK)}
    if closed and not out:
        logger.warning(f"{printable(some(sorted(closed)))}: may not be written to; results are in {table} alone")
    network, names, loaded = load_classifier(config, weights, logger.warning)
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
        probabilities, classes = class_probabilities(config, logits)[0].topk(min(TOP, len(names)))
        result["top"] = [
            {"class": index, "name": names[index], "probability": float(f"{probability:.6g}")}
            for index, probability in zip(classes.tolist(), probabilities.tolist())
        ]
        logger.info(printable(str(path)))
        for entry in result["top"]:
            logger.info(f"    {100 * entry['probability']:6.2f} %  {entry['name']}")
        results.append(result)
        if path.parent not in closed:
            try:
                write_json(f"{path}{TOP5}", about | result)
            except UserError as error:
                logger.warning(printable(f"{error.one_line()}; the result is in {table} alone"))
    _write_table(table, results, min(TOP, len(names)))
    logger.info(f"results of all pictures: {table}")
    if session.args.json:
        write_json(session.args.json, {**about, "pictures": results})
    if faults:
        logger.error(f"{faults} of {len(paths)} pictures: see above")
        raise SystemExit(1)


def _write_table(path: Path, results: Sequence[dict[str, Any]], top: int) -> None:
    columns = [name for i in range(1, top + 1) for name in (f"top{i}", f"top{i}_name", f"p{i}")]
    rows = []
    for result in results:
        entries = [entry[key] for entry in result.get("top", ()) for key in ("class", "name", "probability")]
        rows.append([result["picture"], *(entries or [""] * len(columns)), result.get("error", "")])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, ["picture", *columns, "error"], rows)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _views_of_each(config: CfgNode, paths: Sequence[Path]) -> Iterator[tuple[Path, Tensor | str]]:
    """Each picture with its views or what is wrong with it, in order; decoded by the loader's workers."""
    images = ImageDataset(PictureSource(paths), views_transform(config))
    workers = min(usable_workers(config), len(paths) - 1)
    for index, views in DataLoader(_Pictures(images), batch_size=None, num_workers=workers, worker_init_fn=init_worker):
        yield paths[index], views
