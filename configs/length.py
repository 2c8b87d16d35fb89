"""What follows from the length of a run, where nobody has set it for this length."""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from .errors import UserError
from .keys import Key

EPOCHS, UPDATES = "TRAIN.EPOCHS", "TRAIN.UPDATES"
WARMUP = {EPOCHS: "TRAIN.WARMUP_EPOCHS", UPDATES: "TRAIN.WARMUP_UPDATES"}  # the warm-up in each unit
MILESTONES = "TRAIN.LR_SCHEDULER.MILESTONES"
_NAMES = (EPOCHS, UPDATES, *WARMUP.values(), MILESTONES)


def follow_length(settings: Iterable[tuple[str, str, Any]], keys: Mapping[str, Key]) -> dict[str, tuple[Any, str]]:
    """What a source (a file, --opts) that sets only the length leaves to follow: {key: (value, why)}.

    Warm-up and milestones stay the share of the run that they are of the length that they were set for.

    Args:
        settings: (origin, name, value) in the order of reading, values of the right types; later ones win.
        keys: all cards, whose defaults come before these.

    Raises UserError where a source sets epochs although an earlier one has set updates, which decide.
    """
    values = {name: keys[name].default for name in _NAMES}
    meant_for = dict.fromkeys(_NAMES, _length(values))  # the length in force where a key was last set
    for origin, group in groupby(settings, key=lambda setting: setting[0]):
        given = {name: value for _, name, value in group if name in values}
        values |= given
        meant_for |= dict.fromkeys(given, _length(values))
        for void, ruling in ((EPOCHS, UPDATES), tuple(WARMUP.values())):
            if void in given and ruling not in given and values[ruling]:
                rules = f"{ruling} = {values[ruling]} decides instead; set that to 0 as well"
                raise UserError(f"{origin}: {void} = {given[void]}: {rules}")

    unit, length = _length(values)
    follows: dict[str, tuple[Any, str]] = {}

    def follow(name: str, source: str) -> None:
        old_unit, old_length = meant_for[source]
        if (old_unit, old_length) != (unit, length) and values[source]:
            why = f"for {unit} = {length} as {values[source]} for {old_unit} = {old_length}; set it to choose another"
            follows[name] = (_scaled(values[source], length / old_length, whole=unit == UPDATES), why)

    warmup_unit = UPDATES if values[WARMUP[UPDATES]] else EPOCHS
    # Updates of warm-up for a run in epochs, or the other way round, are no share of it that is known here.
    if meant_for[WARMUP[warmup_unit]][0] == warmup_unit:
        follow(WARMUP[unit], WARMUP[warmup_unit])
        if WARMUP[unit] in follows and unit == UPDATES:  # which may be none, and epochs must not decide then
            follows[WARMUP[EPOCHS]] = (0, f"{WARMUP[UPDATES]} decides")
    follow(MILESTONES, MILESTONES)
    return follows


def _length(values: Mapping[str, Any]) -> tuple[str, int]:
    """The key that decides, and its value."""
    return (UPDATES, values[UPDATES]) if values[UPDATES] else (EPOCHS, values[EPOCHS])


def _scaled(value: Any, factor: float, whole: bool) -> Any:
    """A number or a list of them x factor: whole updates, or hundredths of an epoch."""
    if isinstance(value, list):
        return [_scaled(number, factor, whole) for number in value]
    return round(value * factor) if whole else round(value * factor, 2)
