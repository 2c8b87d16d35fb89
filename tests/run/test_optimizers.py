"""TRAIN.OPTIMIZER: timm's optimizers by name, with their arguments, continued with the same bits."""

import io

import pytest
import runs
import torch
from timm.optim import MADGRAD, Adopt, Lion, Muon, list_optimizers
from torch import nn

from configs import UserError
from utils.optimizer import build_optimizer, load_optimizer, parse_arguments

NOT_HERE = ("fused*", "bnb*", "adahessian", "adamw", "sgd")  # of GPU libraries, refused, and tested by the recipe
KRON = [pytest.param(name, marks=pytest.mark.compile) for name in list_optimizers("kron*")]  # timm compiles it
NAMES = [*list_optimizers(exclude_filters=[*NOT_HERE, "kron*"]), *KRON, "lookahead_lamb"]


def small_network():
    torch.manual_seed(0)
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    head = nn.Linear(8, 5)
    return nn.Sequential(nn.Conv2d(3, 8, 3), depthwise, nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(2), _Mean(), head)


class _Mean(nn.Module):
    def forward(self, x):
        return x.mean(2)


def update(network, optimizer, number):
    torch.manual_seed(number)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3 * (1 + number % 3)
    network(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_ten_updates_with_a_resume_between(make_config, name):
    """Lookahead acts every sixth update, first without effect: it gets more of them."""
    updates, stop = (20, 8) if "lookahead" in name else (10, 5)
    config = make_config("--opts", "TRAIN.OPTIMIZER.NAME", name)
    straight, stopped, continued = small_network(), small_network(), small_network()
    optimizer = build_optimizer(config, straight, lr=1e-3)
    for number in range(updates):
        update(straight, optimizer, number)
    optimizer = build_optimizer(config, stopped, lr=1e-3)
    for number in range(stop):
        update(stopped, optimizer, number)
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    continued.load_state_dict(saved["model"])
    optimizer = build_optimizer(config, continued, lr=1e-3)
    load_optimizer(optimizer, saved["optimizer"])
    for number in range(stop, updates):
        update(continued, optimizer, number)
    for weights, expected, start in zip(continued.parameters(), straight.parameters(), small_network().parameters()):
        assert torch.equal(weights, expected) and weights.isfinite().all()
        assert weights.dim() < 2 or not torch.equal(weights, start)


def test_a_run_with_muon_that_is_stopped_ends_with_the_same_bits(data, tmp_path, monkeypatch):
    opts = ("TRAIN.OPTIMIZER.NAME", "muon", "TRAIN.OPTIMIZER.ARGS", "momentum=0.9, fallback_list=('head.*',)")
    one, two = (runs.arguments(data, tmp_path / name, *opts) for name in ("one", "two"))
    assert runs.train_here(monkeypatch, one) == 0
    assert runs.train_here(monkeypatch, two, stop_at=3) == 75
    assert runs.train_here(monkeypatch, two) == 0
    assert runs.final_state(tmp_path / "one", 2) == runs.final_state(tmp_path / "two", 2)


@pytest.mark.parametrize("name", ["madgrad", "adopt"])
def test_another_optimizer_starts_without_the_state_of_the_one_before(data, tmp_path, monkeypatch, name):
    """It took that state: some failed at their first update, others went on with wrong moments."""
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path), stop_at=3) == 75
    args = runs.arguments(data, tmp_path, "TRAIN.OPTIMIZER.NAME", name)
    with pytest.raises(UserError, match=rf"TRAIN.OPTIMIZER.NAME 'adamw' -> '{name}'; restore these values"):
        runs.train_here(monkeypatch, args)
    started = []
    with monkeypatch.context() as patch:
        step = {"madgrad": MADGRAD, "adopt": Adopt}[name].step
        patch.setattr(
            f"timm.optim.{name}.{step.__qualname__}", lambda self: started.append(len(self.state)) or step(self)
        )
        assert runs.train_here(monkeypatch, ["--allow-changes", *args]) == 0
    assert started[0] == 0 < started[1]
    log = (runs.run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert f"holds the state of the optimizer adamw; that of {name} begins anew" in log


def test_arguments_reach_the_optimizer_and_the_rest_is_its_own(make_config):
    def build(*opts):
        return build_optimizer(make_config("--opts", *opts), small_network(), lr=1e-3)

    lion = build("TRAIN.OPTIMIZER.NAME", "lion")
    assert isinstance(lion, Lion) and lion.param_groups[0]["betas"] == (0.9, 0.99), "not AdamW's"
    assert [group["weight_decay"] for group in lion.param_groups] == [0.05, 0.0]
    muon = build("TRAIN.OPTIMIZER.NAME", "muon", "TRAIN.OPTIMIZER.ARGS", "ns_steps=3, fallback_list='6.*'")
    assert isinstance(muon, Muon) and {group["ns_steps"] for group in muon.param_groups} == {3}
    to_adamw = [tuple(p.shape) for group in muon.param_groups if group.get("use_fallback") for p in group["params"]]
    assert sorted(to_adamw) == [(5,), (5, 8)], "the head"
    adamw = build("TRAIN.OPTIMIZER.ARGS", "amsgrad=True")
    assert [(g["amsgrad"], g["eps"], g["fused"]) for g in adamw.param_groups] == [(True, 1e-8, True)] * 2
    assert build("TRAIN.OPTIMIZER.NAME", "kron").deterministic, "or processes would drift apart"


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("LAMB", "", "timm has no such optimizer; did you mean lamb"),
        ("nonesuch", "", "timm has no such optimizer"),
        ("adahessian", "", "needs second derivatives; no run computes them"),
        ("lamb", "speed=3", "lamb takes no speed; it takes always_adapt, .*betas, "),
        # What timm would drop without a word: it is for others, or for parameters without groups.
        ("lamb", "momentum=0.5", "lamb takes no momentum"),
        ("lion", "eps=1e-3", "lion takes no eps"),
        ("sgd", "betas=(0.1, 0.2)", "sgd takes no betas"),
        ("adamw", "layer_decay=0.5", "adamw takes no layer_decay"),
        ("lamb", "filter_bias_and_bn=False", "lamb takes no filter_bias_and_bn"),
        ("lookahead_lamb", "fallback_list='head.*'", "lookahead_lamb takes no fallback_list"),
        # What would end the first update.
        ("lamb", "betas=(0.9,)", r"betas of lamb must be 2 numbers, such as betas=\(0.9, 0.999\)"),
        ("adan", "betas=0.9", "betas of adan must be 3 numbers"),
        ("muon", "conv_mode='x'", "timm cannot make this optimizer: Invalid conv_mode: x"),
        ("bnbadam", "", "timm cannot make this optimizer: CUDA required"),
        ("adamw", "lr=1", "lr has a key of its own; set TRAIN.BASE_LR"),
        ("lamb", "weight_decay=1", "weight_decay has a key of its own; set TRAIN.WEIGHT_DECAY"),
    ],
)
def test_optimizers_that_cannot_be_are_refused(make_config, name, args, message):
    config = make_config("--opts", "TRAIN.OPTIMIZER.NAME", name, "TRAIN.OPTIMIZER.ARGS", args)
    with pytest.raises(UserError, match=rf"^TRAIN.OPTIMIZER.*{message}") as caught:
        build_optimizer(config, small_network(), lr=1e-3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0.9", "a=b", "a=1 b=2", "**{}", "a=__import__('os')", "x) or dict(y=1", "\0", "a"])
def test_what_is_no_argument(text):
    with pytest.raises(UserError, match="must be names and values, such as"):
        parse_arguments(text)


def test_settings_of_another_optimizer_are_not_dropped_silently(make_config):
    for key in ("EPS", "MOMENTUM"):
        with pytest.raises(UserError, match=r"NAME = 'lamb': EPS and BETAS are AdamW's and MOMENTUM is SGD's"):
            make_config("--opts", "TRAIN.OPTIMIZER.NAME", "lamb", f"TRAIN.OPTIMIZER.{key}", "0.5")
    make_config("--opts", "TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.EPS", "0.5")  # as ever
