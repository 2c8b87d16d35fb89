"""From a file of weights to a segmenter for evaluation; UserError names the file and what is wrong with it."""

from collections.abc import Callable, Sequence

from torch import nn
from yacs.config import CfgNode

from configs import UserError, with_num_classes
from utils.checkpoint import load_exactly, load_file, select_weights

from .network import Segmenter

_AUXILIARY = "auxiliary."  # what only training needs


def load_segmenter(
    config: CfgNode, path: str, classes: Sequence[str] = (), notify: Callable[[str], None] = lambda line: None
) -> tuple[nn.Module, list[str], str]:
    """The configuration's network with the weights of a file, the names of its classes, and what was loaded.

    Args:
        config: describes the network; TEST.WEIGHTS chooses raw or averaged weights.
        path: a checkpoint of a segmentation run.
        classes: of the data; without any, those that the checkpoint holds.
        notify: is called with one line where the checkpoint has other names for as many classes.

    Raises UserError where the weights do not fit.
    """
    checkpoint = load_file(path)
    state, kind = select_weights(checkpoint, config.TEST.WEIGHTS, path)
    trained_on = checkpoint.get("classes")
    trained_on = [str(name) for name in trained_on] if isinstance(trained_on, list) else []
    if not any(name.startswith("backbone.") for name in state):
        raise UserError(f"{path}: holds no segmentation network; a classifier's weights are for train.py --pretrained")
    if trained_on and classes and len(trained_on) != len(classes):
        raise UserError(f"{path}: was trained on {len(trained_on)} classes, but the data has {len(classes)}")
    renamed = [pair for pair in zip(trained_on, classes) if pair[0] != pair[1]]
    if renamed:
        before, now = renamed[0]
        notify(
            f"{path}: {len(renamed)} of its {len(classes)} classes have other names than the data's, the first "
            f"{before!r} against {now!r}: the numbers mean nothing unless they are the same classes in the same order"
        )
    names = list(classes) or trained_on or [str(number) for number in range(config.MODEL.GMA.NUM_CLASSES)]
    network = Segmenter(with_num_classes(config, len(names)), auxiliary=False)
    load_exactly(network, {name: value for name, value in state.items() if not name.startswith(_AUXILIARY)}, path)
    return network.eval(), names, f"{kind} of {path}"
