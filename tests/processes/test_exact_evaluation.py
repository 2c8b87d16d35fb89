"""Evaluation on any number of processes: each image counts once."""

import contextlib
import copy
import io
import logging
import re
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import Forked
from torch import nn

from data import build_eval_loader
from tasks.classification.images import eval_dataset, open_split
from tasks.classification.inference import run_network
from utils.precision import Precision
from utils.processes import Processes
from utils.supervision import RunSupervisor


class Brightness(nn.Module):
    """Class scores from the mean colour: nothing to train, another answer for every image."""

    def forward(self, images):
        colour = images.mean(dim=(2, 3))
        return torch.cat([colour, colour * 3 - 1], dim=1)[:, :6]


def _with_samples(source, samples):
    part = copy.copy(source)
    part.samples = samples
    return part


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_of_1_to_17_images_is_exact(tmp_path, data, make_config, world_size):
    """Every number of images on every number of processes: the counts of a plain loop over all images."""
    cfg = make_config(
        "--data-path", data, "--batch-size", "2", "--opts", "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0"
    )
    source = open_split(cfg, "train", 0, 1)
    order = torch.randperm(len(source.samples), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [source.samples[i] for i in order]

    def evaluate_as(rank):
        logger = logging.getLogger("nowhere")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
        if world_size > 1:
            timeout = timedelta(seconds=60)
            store = dist.FileStore(str(tmp_path / "store"), world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        processes = Processes(rank, rank, world_size, torch.device("cpu"))
        supervisor = RunSupervisor(processes, 60)
        supervisor.listen()
        session = SimpleNamespace(processes=processes, logger=logger, config=cfg, supervisor=supervisor)
        precision = Precision("cpu", torch.float32, enabled=False)
        for count in range(1, 18):
            part = _with_samples(source, samples[:count])
            loader, _ = build_eval_loader(cfg, eval_dataset(cfg, part), rank, world_size, False)
            with contextlib.redirect_stdout(io.StringIO()):
                sums = run_network(session, cfg, Brightness(), loader, precision)
            acc1, acc5, loss = sums.means().values()
            print(f"result {count} {sums.count} {acc1!r} {acc5!r} {loss!r}")

    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(Forked(lambda r=rank: evaluate_as(r))) for rank in range(world_size)]
        for child in children:
            assert child.finish() == [0], child.text
    texts = [re.findall(r"result (\d+) (\d+) (\S+) (\S+) (\S+)", child.text) for child in children]
    assert all(text == texts[0] for text in texts)

    loader, _ = build_eval_loader(cfg, eval_dataset(cfg, _with_samples(source, samples)), 0, 1, False)
    logits = torch.cat([Brightness()(views[:, 0]) for views, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    hits = logits.topk(5).indices == labels[:, None]
    losses = nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert len(texts[0]) == 17
    for count, (images, counted, acc1, acc5, loss) in enumerate(texts[0], start=1):
        assert (int(images), int(counted)) == (count, count)
        assert float(acc1) == 100 * hits[:count, 0].sum().item() / count
        assert float(acc5) == 100 * hits[:count].sum().item() / count
        assert float(loss) == pytest.approx(losses[:count].mean().item(), rel=1e-5)
