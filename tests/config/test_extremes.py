"""Extreme values of every key: one line, or they work. Training itself is tried with those that got through once."""

import pytest
from torch import nn

import tasks
from configs import UserError, read_config
from configs.keys import KEYS, Key
from tasks.classification.transforms import build_mixup, eval_transform, train_transform
from tasks.networks import build_model, check_batch_norms
from utils.optimizer import build_optimizer
from utils.schedule import build_scheduler, run_length, scaled_learning_rates, unusual_settings

CARDS = {**KEYS, **tasks.keys_of("classification")}
WHOLE = ["-1", "0", "1", "2", "3", str(2**31), str(2**63), "1" + 40 * "0"]
NUMBERS = ["-1", "0", "1e-320", "1e-300", "0.5", "0.999999", "1", "1e10", "1e308", "inf", "nan"]
TEXTS = ["", "x", "a\nb", 300 * "é", "$\\frac$", "{0}", "%s", "\x00"]
LISTS = ["[]", "[0]", "[-1]", "[1, 1]", "[0.001, 0.001]", "[0.5, 0.5]", "[0, 1]", "[0, 0]", "[1, 0]", "[2, 2, 2, 2]"]
LISTS += ["[1, 30]", f"[{2**63}, 1, 1, 1]", "[1e308, 1e308]", "[0.9999, 0.99999999]", "[None, 1]", "None", "[[1]]"]
SMALL = ("MODEL.GMA.EMBEDDING_DIMS", "[10, 10, 10, 10]", "MODEL.GMA.SERIAL_DEPTHS", "[1, 1, 1, 1]")


def extremes(key: Key) -> list[str]:
    names = [str(name) for rule in key.rules for name in rule.choices]
    if names or isinstance(key.default, bool):
        return [*names, "True", "False", "1", "nonsense"]
    if isinstance(key.default, str):
        return TEXTS + LISTS * (key.kind == "name or numbers")
    if isinstance(key.default, int | float) or key.kind == "number or None":
        return WHOLE + NUMBERS
    return LISTS


@pytest.mark.parametrize("name", CARDS)
def test_extremes_are_refused_in_one_line_or_work(name, tmp_path):
    (tmp_path / "run.yaml").write_text("")
    for value in extremes(CARDS[name]):
        words = ["--cfg", str(tmp_path / "run.yaml"), "--opts", *SMALL, name, value]
        try:
            config = read_config(words, tasks.keys_of, notify=lambda line: None)
            length, rates = run_length(config, 1000), scaled_learning_rates(config, 8)
            unusual_settings(config, 8, length)
            network = build_model(config) if name.startswith("MODEL.GMA") else nn.Linear(1, 1)
            check_batch_norms(config, 1)
            optimizer = build_optimizer(config, network, rates.base)
            scheduler = build_scheduler(config, optimizer, rates, length)
            for update in (0, length.updates - 1):
                scheduler.step_update(update)
            build_mixup(config)
            train_transform(config)
            eval_transform(config)
        except UserError as error:
            assert "\n" not in error.one_line() and len(error.one_line()) > 20
