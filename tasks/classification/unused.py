"""Keys that somebody has set and that change nothing in a run, because of the values of others."""

from operator import attrgetter

from yacs.config import CfgNode

from .keys import KEYS
from .transforms import build_mixup


def unused_settings(config: CfgNode) -> list[str]:
    """A line for each key of a training run that has no effect although its value is not the default."""
    epochs = config.TRAIN.EPOCHS
    needs = [  # keys, whether they have an effect, and why not
        (("DISTILL.KIND", "DISTILL.WEIGHT", "DISTILL.TEMPERATURE"), config.DISTILL.TEACHER, "no DISTILL.TEACHER"),
        (("DISTILL.TEMPERATURE",), config.DISTILL.KIND == "soft", "DISTILL.KIND is 'hard'"),
        (("LOSS.EFFECTIVE_BETA",), config.LOSS.CLASS_WEIGHTS == "effective", "LOSS.CLASS_WEIGHTS is not 'effective'"),
        (("DATA.SCALE_BATCH",), config.DATA.TRAIN_SIZES, "no DATA.TRAIN_SIZES"),
        (("AUG.REMODE", "AUG.RECOUNT"), config.AUG.REPROB, "AUG.REPROB is 0"),
        (("AUG.MIXUP_SWITCH_PROB", "AUG.MIXUP_MODE", "AUG.MIXUP_OFF_EPOCH"), build_mixup(config), "nothing is mixed"),
        (
            ("AUG.MIXUP_OFF_EPOCH",),
            config.TRAIN.UPDATES or epochs > config.AUG.MIXUP_OFF_EPOCH,
            f"the run ends with TRAIN.EPOCHS = {epochs}",
        ),
    ]
    why = {name: reason for names, used, reason in reversed(needs) if not used for name in names}
    values = {name: attrgetter(name)(config) for name in KEYS}
    return [
        f"{name} = {value!r}: has no effect: {why[name]}; leave it out"
        for name, value in values.items()
        if name in why and value != KEYS[name].default
    ]
