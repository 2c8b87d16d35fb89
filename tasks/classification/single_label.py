"""The evaluation of images of one class each: accuracies, calibration, predictions."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from yacs.config import CfgNode

from configs import UserError
from utils.precision import Precision
from utils.processes import run_on_main_and_broadcast
from utils.session import Session

from .inference import predict
from .outputs import describe, summarize, write_outputs
from .validation_sets import ValidationSet

TABLE = (("Acc@1", "acc1", 3), ("Acc@5", "acc5", 3), ("NLL", "nll", 4), ("ECE", "ece", 4))  # title, key, decimals


def evaluate(
    session: Session,
    config: CfgNode,
    network: nn.Module,
    images: ValidationSet,
    precision: Precision,
    about: dict[str, Any],
    folder: Path,
    title: str,
) -> dict[str, Any]:
    """Evaluate at one size, log the numbers, and write what `outputs.write_outputs` says to `folder`.

    Returns what metrics.json holds, on every process: `about`, and the numbers of `summarize`. UserError where an
    output is not finite.
    """
    predictions = predict(session, config, network, images.source, precision, images.outputs, title)

    def conclude() -> dict[str, Any]:
        if not np.isfinite(predictions.nll[predictions.labelled]).all():
            raise UserError(f"{about['weights']}: gives outputs that are not finite; weights or AMP_DTYPE are at fault")
        summary = about | summarize(predictions, images.label_sets)
        for line in describe(summary):
            session.logger.info(line)
        try:
            write_outputs(folder, predictions, summary)
        except OSError as error:
            raise UserError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
        session.logger.info(f"predictions, accuracy by class, confusion and metrics are in {folder}")
        return summary

    return run_on_main_and_broadcast(conclude, session.processes)


def last_line(numbers: dict[str, Any]) -> str:
    """The line that the released test.py ends with."""
    return f" * Acc@1 {numbers['acc1']:.3f} Acc@5 {numbers['acc5']:.3f}"
