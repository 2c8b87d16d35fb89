"""Detections of images, at the images' own size, gathered from all processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval.core import mask as run_length
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from utils.evaluation import evaluation_batches
from utils.precision import Precision
from utils.session import Session

from .coco import CocoSplit

MASK_THRESHOLD = 0.5  # probability from where on a pixel belongs to an object
Result = dict[str, Any]  # an entry of COCO's results format


@dataclass(frozen=True)
class Detections:
    """What was found in an image of (H, W), by falling score."""

    boxes: Tensor  # (N, 4): left, top, right, bottom, pixels of the image
    scores: Tensor  # (N), 0 to 1
    labels: Tensor  # (N), class indices
    masks: list[dict[str, Any]] | None  # compressed run lengths of H x W, as JSON takes them


@torch.inference_mode()
def detect(network: nn.Module, image: Tensor, size: tuple[int, int], precision: Precision) -> Detections:
    """Detect in one image, uint8 (3, H, W) as resized, on the network's device; `size` is its own height and width."""
    with precision.autocast():
        (found,) = network([image])
    boxes = resize_boxes(found["boxes"].float(), image.shape[-2:], size).cpu()
    masks = None
    if "masks" in found:
        masks, probabilities = [], found["masks"].float().cpu()
        # One by one: a hundred masks of a large photograph would be gigabytes.
        for one in (slice(number, number + 1) for number in range(len(boxes))):
            pasted = paste_masks_in_image(probabilities[one], boxes[one], size)[0, 0] > MASK_THRESHOLD
            encoded = run_length.encode(np.asfortranarray(pasted.numpy().astype(np.uint8)))
            masks.append({"size": list(size), "counts": encoded["counts"].decode()})
    labels = found["labels"].cpu() - network.first_label
    return Detections(boxes, found["scores"].float().cpu(), labels, masks)


def results_of(detections: Detections, image_id: int, categories: Mapping[int, int]) -> list[Result]:
    """Entries of COCO's results format; `categories` gives the id of each class, classes without one are left out.

    Numbers are rounded to thousandths of a pixel and millionths of a score.
    """
    results = []
    columns = (values.double().tolist() for values in (detections.boxes, detections.scores, detections.labels))
    for number, (box, score, label) in enumerate(zip(*columns)):
        if label not in categories:
            continue
        left, top, right, bottom = box
        result = {
            "image_id": image_id,
            "category_id": categories[label],
            "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
            "score": round(score, 6),
        }
        if detections.masks is not None:
            result["segmentation"] = detections.masks[number]
        results.append(result)
    return results


def predict(
    session: Session,
    network: nn.Module,
    split: CocoSplit,
    loader: DataLoader,
    precision: Precision,
    categories: Mapping[int, int],
    title: str = "Test: ",
) -> list[list[Result]] | None:
    """The results of every image of the split, in its order, on the main process; None on the others.

    The network sees one image at a time, because padding to a batch would reach its attention. So the results have the
    same bits on any number of processes.

    Args:
        session: the run.
        network: the bare network.
        split: the images.
        loader: this process's samples of `EvalImages`, one a batch and not collated.
        precision: how the forward pass computes.
        categories: as for `results_of`.
        title: what log lines begin with.

    Raises StopRequested, on all processes, where one was asked to stop.
    """
    network.eval()
    own: list[list[Result]] = []
    count = 0

    def found() -> str:
        return f"{count} detections"

    for index, image in evaluation_batches(session, loader, len(split), 1, title, found):
        shape = split.images[index]
        results = results_of(detect(network, image, (shape.height, shape.width), precision), shape.id, categories)
        count += len(results)
        own.append(results)
    return _gather(own, len(split), session)


def _gather(own: list[list[Result]], num_images: int, session: Session) -> list[list[Result]] | None:
    """Bring the processes' results together on the main one, in the order of the data set."""
    processes = session.processes
    if not processes.distributed:
        return own
    shares: list[Any] | None = [None] * processes.world_size if processes.is_main else None
    dist.gather_object(own, shares)
    if shares is None:
        return None
    return [shares[index % processes.world_size][index // processes.world_size] for index in range(num_images)]


def flatten(results: Sequence[list[Result]]) -> list[Result]:
    """The results of all images as one list."""
    return [result for of_image in results for result in of_image]
