"""The loop that every evaluation runs over this process's batches, and the folder of its results."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch.utils.data import DataLoader

from configs import UserError
from configs.errors import StopRequested

from .engine import to_device
from .files import check_folder
from .run_log import ProgressLog, peak_memory_mib
from .session import Session
from .task import Batch


def evaluation_batches(
    session: Session,
    loader: DataLoader,
    num_batches: int,
    batch_size: int,
    title: str = "Test: ",
    fields: Callable[[], str] = str,
) -> Iterator[Batch]:
    """This process's batches on its device, with a bar, and log lines that end in what `fields` says.

    Args:
        session: the run.
        loader: from `data.build_eval_loader`; processes may have different numbers of batches.
        num_batches: of all processes together.
        batch_size: samples of a batch, for the speed in log lines.
        title: what log lines begin with.
        fields: gives the numbers so far, when a line is due.

    Raises StopRequested, on all processes, where one was asked to stop.
    """
    processes, supervisor = session.processes, session.supervisor
    share = f"\t(the share of process {processes.rank})" if processes.distributed else ""
    console = ProgressLog(
        session.logger, title, len(loader), every=session.config.PRINT_FREQ, show_bar=processes.is_main
    )
    for number, batch in enumerate(loader):
        if number < num_batches // processes.world_size and supervisor.stop_agreed():
            raise StopRequested
        yield to_device(batch, processes.device)
        if console.step():
            console.line(f"{fields()}\tmem {peak_memory_mib(processes.device):.0f}MB{share}", batch_size)
    console.close()
    # Here too: a process that waits for a failed one on the GPU does not come back, and could not save any more.
    if supervisor.stop_agreed():
        raise StopRequested


def check_results_folders(folders: Sequence[Path], weights: str) -> None:
    """Raise UserError where a folder cannot be written to, or its evaluation of another file would be lost."""
    for folder in folders:
        check_folder(folder)
        try:
            other = json.loads((folder / "metrics.json").read_text())["file"]
        except (OSError, ValueError, KeyError):
            continue
        if other != str(Path(weights).resolve()):
            raise UserError(f"{folder}: holds the evaluation of {other}; give this one another --tag")
