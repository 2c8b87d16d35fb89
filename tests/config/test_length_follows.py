"""A warm-up and milestones that nobody has set for the length of a run stay the same share of it."""

from pathlib import Path

import pytest

import tasks
from configs import UserError
from configs.load import flatten, read_command

WARMUP, UPDATES, MILESTONES = "TRAIN.WARMUP_EPOCHS", "TRAIN.WARMUP_UPDATES", "TRAIN.LR_SCHEDULER.MILESTONES"


@pytest.fixture
def followed(tmp_path: Path):
    """What follows in the configuration of a YAML file with --opts: {key: value}."""

    def of(text: str, *opts: str) -> dict:
        (tmp_path / "run.yaml").write_text(text)
        words = ["--cfg", str(tmp_path / "run.yaml"), *(["--opts", *opts] if opts else [])]
        _, config, keys = read_command(words, tasks.keys_of)
        values = dict(flatten(config))
        return {name: values[name] for name, key in keys.items() if key.follows}

    return of


IN_EPOCHS = "TRAIN: {EPOCHS: 20, WARMUP_EPOCHS: 2}"
IN_UPDATES = "TRAIN: {UPDATES: 900, WARMUP_UPDATES: 10, LR_SCHEDULER: {NAME: multistep, MILESTONES: [600, 800]}}"


@pytest.mark.parametrize(
    ("text", "opts", "expected"),
    [
        ("", (), {}),
        ("", ("TRAIN.EPOCHS", "300"), {}),
        ("", ("TRAIN.EPOCHS", "10"), {WARMUP: 0.67}),
        ("", ("TRAIN.EPOCHS", "90"), {WARMUP: 6}),
        ("TRAIN: {EPOCHS: 30}", (), {WARMUP: 2}),
        (IN_EPOCHS, (), {}),
        (IN_EPOCHS, ("TRAIN.EPOCHS", "1"), {WARMUP: 0.1}),
        (IN_EPOCHS, ("TRAIN.EPOCHS", "1", WARMUP, "0"), {}),
        (IN_EPOCHS, (WARMUP, "3"), {}),
        (IN_EPOCHS, ("TRAIN.UPDATES", "500"), {UPDATES: 50, WARMUP: 0}),
        ("TRAIN: {WARMUP_EPOCHS: 0}", ("TRAIN.EPOCHS", "10"), {}),
        (IN_UPDATES, (), {}),
        (IN_UPDATES, ("TRAIN.UPDATES", "90"), {UPDATES: 1, WARMUP: 0, MILESTONES: [60, 80]}),
        (IN_UPDATES, ("TRAIN.UPDATES", "9"), {UPDATES: 0, WARMUP: 0, MILESTONES: [6, 8]}),
        (IN_UPDATES, ("TRAIN.UPDATES", "0", "TRAIN.EPOCHS", "12", UPDATES, "0"), {WARMUP: 0.8, MILESTONES: [8, 10.67]}),
        ("TRAIN: {EPOCHS: 12, WARMUP_UPDATES: 500}", ("TRAIN.EPOCHS", "36"), {}),
    ],
)
def test_what_follows(followed, text, opts, expected):
    assert followed(text, *opts) == expected


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ("TRAIN.EPOCHS", "12"),
            "--opts: TRAIN.EPOCHS = 12: TRAIN.UPDATES = 900 decides instead; set that to 0 as well",
        ),
        ((WARMUP, "1"), "--opts: TRAIN.WARMUP_EPOCHS = 1: TRAIN.WARMUP_UPDATES = 10 decides instead"),
    ],
)
def test_epochs_that_would_decide_nothing_are_refused(followed, opts, message):
    with pytest.raises(UserError, match=message):
        followed(IN_UPDATES, *opts)
    assert followed(IN_UPDATES.replace("{UPD", "{EPOCHS: 12, UPD")) == {}, "in one file both may stand"
