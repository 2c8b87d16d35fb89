"""The recipe in numbers: learning rates, weight decay, optimizer, loss and mixing of a run as configured."""

import math
from pathlib import Path

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from configs import UserError, with_num_classes
from models.groupmixformer import prefixed_matcher
from tasks.classification.losses import build_criterion
from tasks.classification.transforms import build_mixup
from tasks.networks import build_model
from utils.optimizer import build_optimizer, scheduled_lr
from utils.schedule import build_scheduler, global_batch_size, run_length, scaled_learning_rates

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IMAGENET_IMAGES = 1_281_167


@pytest.fixture
def recipe(make_config):
    """The released recipe of the small variant, changed by --opts pairs."""

    def configure(*opts: object, cfg: str = "groupmixformer_small"):
        words = ["--opts", *map(str, opts)] if opts else []
        return make_config("--cfg", str(CONFIGS / f"{cfg}.yaml"), *words)

    return configure


# -------------------------------------------------------------------------------------------------------- learning rate
def learning_rate(config, world_size: int, updates_per_epoch: int):
    """A function from the update, counted from 0, to the learning rate that it uses."""
    rates = scaled_learning_rates(config, world_size)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=rates.base)
    scheduler = build_scheduler(config, optimizer, rates, run_length(config, updates_per_epoch))

    def at(update: int) -> float:
        scheduler.step_update(update)
        values = {group["lr"] for group in optimizer.param_groups}
        assert len(values) == 1
        return values.pop()

    return at


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation", "global_batch"),
    [(128, 8, 1, 1024), (64, 8, 1, 512), (128, 1, 4, 512), (32, 4, 8, 1024), (100, 1, 1, 100)],
)
def test_rates_scale_with_the_global_batch(recipe, batch_size, world_size, accumulation, global_batch):
    config = recipe("DATA.BATCH_SIZE", batch_size, "TRAIN.ACCUMULATION_STEPS", accumulation)
    assert global_batch_size(config, world_size) == global_batch
    rates = scaled_learning_rates(config, world_size)
    expected = [rate * global_batch / 512 for rate in (5e-4, 5e-7, 5e-6)]
    assert [rates.base, rates.warmup, rates.minimum] == pytest.approx(expected, rel=1e-12)
    assert config.TRAIN.BASE_LR == 5e-4, "the configuration is not changed"


@pytest.mark.parametrize("accumulation", [1, 4])
def test_cosine_of_the_released_recipe(recipe, accumulation):
    """8 GPUs, batch 128: numbers written out. Accumulation makes fewer updates with proportionally larger rates."""
    config = recipe("TRAIN.ACCUMULATION_STEPS", accumulation)
    updates_per_epoch = IMAGENET_IMAGES // (1024 * accumulation)
    assert updates_per_epoch == {1: 1251, 4: 312}[accumulation]
    total, warmup = 300 * updates_per_epoch, 20 * updates_per_epoch
    base, first, minimum = (accumulation * rate for rate in (1e-3, 1e-6, 1e-5))
    lr = learning_rate(config, 8, updates_per_epoch)

    def cosine(t: int) -> float:
        return minimum + (base - minimum) * (1 + math.cos(math.pi * t / total)) / 2

    assert lr(0) == pytest.approx(first, rel=1e-12)
    assert lr(1) == pytest.approx(first + (base - first) / warmup, rel=1e-12)
    assert lr(warmup // 2) == pytest.approx((first + base) / 2, rel=1e-9)
    assert lr(warmup - 1) == pytest.approx(base - (base - first) / warmup, rel=1e-12)
    # The cosine runs from update 0: after the warm-up it goes on where it would be, a little below the base rate.
    assert lr(warmup) == pytest.approx(cosine(warmup), rel=1e-12)
    assert lr(warmup) / base == pytest.approx(0.98918, abs=1e-5)
    assert lr(total // 2) == pytest.approx((base + minimum) / 2, rel=1e-9)
    assert lr(total - 1) == pytest.approx(cosine(total - 1), rel=1e-12)
    assert minimum < lr(total - 1) < minimum * 1.0001
    assert lr(total) == pytest.approx(minimum)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["cosine", "linear", "poly", "step", "multistep"])
def test_every_update_by_closed_formula(recipe, name, accumulation):
    step = ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", 4, "TRAIN.LR_SCHEDULER.DECAY_RATE", 0.2)
    length = ("TRAIN.EPOCHS", 12, "TRAIN.WARMUP_EPOCHS", 3, "TRAIN.ACCUMULATION_STEPS", accumulation)
    others = ("TRAIN.LR_SCHEDULER.POWER", 0.9, "TRAIN.LR_SCHEDULER.MILESTONES", "[5, 11]")
    config = recipe("TRAIN.LR_SCHEDULER.NAME", name, *step, *others, *length)
    updates_per_epoch = 7
    total, warmup = 12 * 7, 3 * 7
    scale = 128 * 2 * accumulation / 512
    base, first, minimum = (rate * scale for rate in (5e-4, 5e-7, 5e-6))

    def expected(t: int) -> float:
        if t < warmup:
            return first + t * (base - first) / warmup
        if name == "cosine":
            return minimum + (base - minimum) * (1 + math.cos(math.pi * t / total)) / 2
        if name == "linear":
            return base - (base - minimum) * (t - warmup) / (total - warmup)
        if name == "poly":
            return minimum + (base - minimum) * (1 - t / total) ** 0.9
        if name == "multistep":
            return base * 0.2 ** ((t >= 5 * 7) + (t >= 11 * 7))
        return base * 0.2 ** (t // (4 * 7))  # counted from update 0, as the cosine is

    lr = learning_rate(config, 2, updates_per_epoch)
    for t in range(total):
        assert lr(t) == pytest.approx(expected(t), rel=1e-12), t
    assert lr(5) == pytest.approx(expected(5)), "and no memory of the update before"


def test_a_detection_schedule_in_updates(recipe):
    """Mask R-CNN 1x: 90,000 updates of 16 images, a tenth of the rate from the 60,001st and the 80,001st on."""
    length = ("TRAIN.UPDATES", 90_000, "TRAIN.WARMUP_UPDATES", 1000, "TRAIN.REFERENCE_BATCH", 16)
    rates = ("DATA.BATCH_SIZE", 2, "TRAIN.BASE_LR", 1e-4, "TRAIN.WARMUP_LR", 1e-7)
    steps = ("TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.MILESTONES", "[60000, 80000]")
    config = recipe(*length, *rates, *steps)
    lr = learning_rate(config, 8, updates_per_epoch=7330)
    expected = {0: 1e-7, 500: 5.005e-5, 999: 9.99001e-5, 1000: 1e-4, 59_999: 1e-4, 60_000: 1e-5, 79_999: 1e-5}
    expected |= {80_000: 1e-6, 89_999: 1e-6}
    assert {t: lr(t) for t in expected} == pytest.approx(expected, rel=1e-9)
    assert scaled_learning_rates(config, world_size=16).base == pytest.approx(2e-4)


def test_the_length_of_a_run_in_updates(recipe):
    length = run_length(recipe("TRAIN.UPDATES", 23, "TRAIN.WARMUP_UPDATES", 5), updates_per_epoch=10)
    assert (length.updates, length.warmup_updates, length.epochs, str(length)) == (23, 5, 3, "23 updates")
    assert [length.updates_of(epoch) for epoch in range(4)] == [10, 10, 3, 0]
    assert [length.is_last(epoch) for epoch in range(3)] == [False, False, True]
    length = run_length(recipe("TRAIN.UPDATES", 20, "TRAIN.WARMUP_EPOCHS", 0.25), updates_per_epoch=10)
    assert (length.epochs, length.updates_of(1), length.warmup_updates, str(length)) == (2, 10, 2, "2 epochs")
    length = run_length(recipe("TRAIN.EPOCHS", 3, "TRAIN.WARMUP_EPOCHS", 1), updates_per_epoch=10)
    assert (length.updates, length.warmup_updates, length.epochs, str(length)) == (30, 10, 3, "3 epochs")


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("TRAIN.WARMUP_UPDATES", 30), "TRAIN.WARMUP_UPDATES: 30 updates of warm-up in a run of 30; lower it"),
        (("TRAIN.UPDATES", 10, "TRAIN.WARMUP_EPOCHS", 1), "TRAIN.WARMUP_EPOCHS: 10 updates of warm-up in a run of 10"),
        (("TRAIN.UPDATES", 10, "TRAIN.START_EPOCH", 1), "TRAIN.START_EPOCH = 1: the run has 1 epochs"),
    ],
)
def test_what_only_the_data_can_tell_of_a_length(recipe, opts, message):
    opts = ("TRAIN.EPOCHS", 3, "TRAIN.WARMUP_EPOCHS", 0, *opts)
    with pytest.raises(UserError, match=message):
        run_length(recipe(*opts), updates_per_epoch=10)


@pytest.mark.parametrize("name", ["cosine", "linear", "poly", "step"])
def test_no_warmup(recipe, name):
    config = recipe("TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.EPOCHS", 2)
    lr = learning_rate(config, 4, 5)
    assert lr(0) == pytest.approx(5e-4)
    assert all(lr(t + 1) <= lr(t) for t in range(9))


@pytest.mark.parametrize("name", ["cosine", "linear", "poly"])
def test_one_update_falls_to_nothing_and_warns_of_nothing(recipe, name, caplog):
    lr = learning_rate(recipe("TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.UPDATES", 1), 4, 5)
    assert lr(0) == pytest.approx(5e-4) and not caplog.records


# --------------------------------------------------------------------------------------------------------- weight decay
def test_which_parameters_decay(recipe):
    config = recipe(cfg="groupmixformer_miny")
    network = build_model(config)
    optimizer = build_optimizer(config, network, lr=1e-3)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0), "released order: with decay first"

    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed_names, spared_names = ([names[id(p)] for p in group["params"]] for group in (decayed, spared))
    assert (len(decayed_names), len(spared_names)) == (363, 501)
    assert sum(p.numel() for p in decayed["params"]) == 5_681_684
    assert sum(p.numel() for p in spared["params"]) == 51_436
    assert 5_681_684 + 51_436 == 5_733_120, "every parameter is in one of the groups"

    shapes = {name: parameter.ndim for name, parameter in network.named_parameters()}
    order = list(shapes)
    assert decayed_names == [n for n in order if shapes[n] > 1 and not n.endswith(".bias")], "released optimizer states"
    assert spared_names == [n for n in order if shapes[n] <= 1 or n.endswith(".bias")], "load by position"
    assert {"head.weight", "conv_stem.proj1.weight"} <= set(decayed_names)
    block = "groupmixformer_backbone.0.gma_stage.0."
    assert {"head.bias", "norm4.weight", "conv_stem.proj1.bias", block + "norm1.weight"} <= set(spared_names)


def test_weight_decay_is_the_configured_one(recipe):
    config = recipe("TRAIN.WEIGHT_DECAY", 0.3, cfg="groupmixformer_digits")
    groups = build_optimizer(config, build_model(config), lr=1e-3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


# ----------------------------------------------------------------------------------------- factors of the learning rate
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_layer_decay_falls_by_its_factor_from_block_to_block(recipe, decay):
    config = recipe("TRAIN.LAYER_DECAY", decay, cfg="groupmixformer_digits")  # blocks per stage: 1, 1, 2, 1
    network = build_model(config)
    rates = scaled_learning_rates(config, world_size=1)
    optimizer = build_optimizer(config, network, rates.base)
    scheduler = build_scheduler(config, optimizer, rates, run_length(config, 10))
    scheduler.step_update(50)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    lrs = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(lrs) == len(names), "every parameter is in one group"
    order = [
        "conv_stem.proj1.weight",
        "patch_embed_layers.0.norm.weight",
        "groupmixformer_backbone.0.gma_stage.0.mlp.fc1.weight",
        "patch_embed_layers.1.norm.weight",
        "groupmixformer_backbone.1.gma_stage.0.mlp.fc1.weight",
        "patch_embed_layers.2.norm.weight",
        "groupmixformer_backbone.2.gma_stage.0.mlp.fc1.weight",
        "groupmixformer_backbone.2.gma_stage.1.mlp.fc1.weight",
        "patch_embed_layers.3.norm.weight",
        "groupmixformer_backbone.3.gma_stage.0.mlp.fc1.weight",
        "head.weight",
    ]
    first, *later = (lrs[name] for name in order)
    steps = [b / a for a, b in zip([first, *later], later)]
    for name, step in zip(order[1:], steps):
        assert step == pytest.approx(1 / decay) or step == pytest.approx(1), name
    assert lrs["groupmixformer_backbone.2.gma_stage.1.norm1.bias"] == lrs[order[7]]
    assert lrs["head.weight"] == scheduled_lr(optimizer), "the classifier learns at the schedule's rate"
    assert lrs["groupmixformer_backbone.2.gma_stage.1.mlp.fc1.weight"] > lrs[order[6]], "block by block"
    assert first < lrs["head.weight"] * decay**4
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all((decays[name] > 0) == (p.ndim > 1) for name, p in network.named_parameters() if "bias" not in name)


class Wrapper(nn.Module):
    """A network that contains the backbone, as detectors do."""

    def __init__(self, names_layers: bool) -> None:
        super().__init__()
        self.backbone = timm.create_model("groupmixformer_miny", features_only=True)
        self.neck = nn.Conv2d(160, 8, 1)
        if names_layers:
            self.group_matcher = lambda coarse: prefixed_matcher(self.backbone.group_matcher(coarse), "backbone.")


def test_layer_decay_works_through_a_wrapper(recipe):
    config = recipe("TRAIN.LAYER_DECAY", 0.9, cfg="groupmixformer_miny")

    def scales(network: nn.Module) -> dict[str, float]:
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        groups = build_optimizer(config, network, 1e-3).param_groups
        return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    wrapped, bare = scales(Wrapper(names_layers=True)), scales(build_model(config))
    assert wrapped.pop("neck.weight") == wrapped.pop("neck.bias") == bare["head.weight"] == 1
    assert len(set(wrapped.values())) == 1 + 3 + 3 + 12 + 4, "the stem and every block"
    for name, scale in wrapped.items():  # the whole network's layers, but for norm4
        assert scale == pytest.approx(bare[name.removeprefix("backbone.model.")], rel=1e-12), name


@pytest.mark.parametrize("network", [Wrapper(names_layers=False), nn.Linear(3, 3)])
def test_layer_decay_that_would_do_nothing_is_refused(recipe, network):
    with pytest.raises(UserError, match=r"TRAIN.LAYER_DECAY = 0.9: .* set it to 1"):
        build_optimizer(recipe("TRAIN.LAYER_DECAY", 0.9), network, lr=1e-3)


@pytest.mark.parametrize("layer_decay", [1.0, 0.8])
def test_the_head_has_a_learning_rate_of_its_own(recipe, layer_decay):
    opts = ("TRAIN.HEAD_LR_SCALE", 10.0, "TRAIN.LAYER_DECAY", layer_decay)
    config = recipe(*opts, cfg="groupmixformer_digits")
    network = build_model(config)
    rates = scaled_learning_rates(config, world_size=1)
    optimizer = build_optimizer(config, network, rates.base)
    build_scheduler(config, optimizer, rates, run_length(config, 10)).step_update(50)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    lrs = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(lrs) == len(names)
    for name, lr in lrs.items():
        if name.startswith("head."):
            assert lr == pytest.approx(10 * scheduled_lr(optimizer))
        else:
            assert lr <= scheduled_lr(optimizer) * (1 + 1e-12), name
    weights = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (weights["head.weight"], weights["head.bias"]) == (0.05, 0.0)


def test_adamw(recipe):
    config = recipe(cfg="groupmixformer_digits")
    optimizer = build_optimizer(config, build_model(config), lr=2e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["eps"], tuple(group["betas"])) == (2e-3, 1e-8, (0.9, 0.999))
        assert not group["amsgrad"]
    opts = ("TRAIN.OPTIMIZER.EPS", "1e-6", "TRAIN.OPTIMIZER.BETAS", "(0.8,0.95)")
    config = recipe(*opts, cfg="groupmixformer_digits")
    group = build_optimizer(config, build_model(config), lr=2e-3).param_groups[0]
    assert (group["eps"], tuple(group["betas"])) == (1e-6, (0.8, 0.95))


@pytest.mark.parametrize("momentum", [0.9, 0.5, 0.0])
def test_sgd_has_nesterov_momentum(recipe, momentum):
    opts = ("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.OPTIMIZER.MOMENTUM", momentum)
    config = recipe(*opts, cfg="groupmixformer_digits")
    optimizer = build_optimizer(config, build_model(config), lr=0.1)
    assert isinstance(optimizer, torch.optim.SGD)
    for group, decay in zip(optimizer.param_groups, (0.05, 0.0), strict=True):
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, momentum, momentum > 0)
        assert (group["weight_decay"], group["dampening"]) == (decay, 0)


# ----------------------------------------------------------------------------------------------------- loss and mixing
MIXUP_OFF, CUTMIX_OFF = ("AUG.MIXUP", 0.0), ("AUG.CUTMIX", 0.0)


@pytest.mark.parametrize(
    ("opts", "loss"),
    [
        ((), SoftTargetCrossEntropy),
        (CUTMIX_OFF, SoftTargetCrossEntropy),
        (MIXUP_OFF, SoftTargetCrossEntropy),  # cutmix alone makes soft targets too
        ((*MIXUP_OFF, *CUTMIX_OFF, "AUG.CUTMIX_MINMAX", "[0.2,0.8]"), SoftTargetCrossEntropy),
        ((*MIXUP_OFF, *CUTMIX_OFF), LabelSmoothingCrossEntropy),
        (("AUG.MIXUP_PROB", 0.0), LabelSmoothingCrossEntropy),
        ((*MIXUP_OFF, *CUTMIX_OFF, "MODEL.LABEL_SMOOTHING", 0.0), nn.CrossEntropyLoss),
        (("MODEL.LABEL_SMOOTHING", 0.0), SoftTargetCrossEntropy),
    ],
)
def test_loss_fits_what_is_switched_on(recipe, opts, loss):
    config = with_num_classes(recipe(*opts), 7)
    mixup = build_mixup(config)
    criterion = build_criterion(config, mixup is not None, counts=[1] * 7)
    assert type(criterion) is loss
    assert (mixup is not None) == (loss is SoftTargetCrossEntropy)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 6, 2])
    if mixup is not None:
        images, targets = mixup(images, targets)
        assert targets.shape == (4, 7)
        assert targets.sum(1) == pytest.approx(torch.ones(4), abs=1e-5)
    value = criterion(torch.zeros(4, 7), targets)
    assert value.item() == pytest.approx(math.log(7), rel=1e-5), "equal logits cost log(classes), whatever the targets"


def test_label_smoothing_by_hand(recipe):
    logits, label = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    log_p = logits.log_softmax(1)[0]
    for smoothing in (0.1, 0.3, 0.0):
        criterion = build_criterion(recipe("MODEL.LABEL_SMOOTHING", smoothing), mixed=False, counts=[1] * 3)
        expected = -((1 - smoothing) * log_p[0] + smoothing * log_p.mean())
        assert criterion(logits, label).item() == pytest.approx(expected.item(), rel=1e-6)


def test_mixup_arguments(recipe):
    mixup = build_mixup(with_num_classes(recipe(), 21))
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.cutmix_minmax) == (0.8, 1.0, None)
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, "batch")
    assert (mixup.label_smoothing, mixup.num_classes) == (0.1, 21)
    opts = {
        "AUG.MIXUP": 0.3, "AUG.CUTMIX_MINMAX": "[0.2,0.8]", "AUG.MIXUP_PROB": 0.6, "AUG.MIXUP_SWITCH_PROB": 0.7,
        "AUG.MIXUP_MODE": "elem", "MODEL.LABEL_SMOOTHING": 0.2,
    }  # fmt: skip
    mixup = build_mixup(recipe(*(word for pair in opts.items() for word in pair)))
    assert (mixup.mixup_alpha, mixup.cutmix_minmax) == (0.3, [0.2, 0.8])
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (0.6, 0.7, "elem")
    assert (mixup.label_smoothing, mixup.num_classes) == (0.2, 1000)


def test_mixup_of_a_batch_by_hand(recipe):
    """Mixup pairs image i with image B-1-i; the targets are the smoothed labels in the same shares."""
    mixup = build_mixup(with_num_classes(recipe(*CUTMIX_OFF), 3))
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    mixed, targets = mixup(images.clone(), labels)
    share = ((mixed[0] - images[3]) / (images[0] - images[3])).median()
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0), atol=1e-4, rtol=1e-4)
    smooth = torch.full((4, 3), 0.1 / 3).scatter_(1, labels[:, None], 0.9 + 0.1 / 3)
    torch.testing.assert_close(targets, share * smooth + (1 - share) * smooth.flip(0), atol=1e-4, rtol=1e-4)


def test_published_recipe_of_every_variant(make_config):
    """The variants differ in the network alone: what is published is one recipe."""
    reference = make_config("--cfg", str(CONFIGS / "groupmixformer_small.yaml"))
    for name in ("miny", "tiny", "base", "large"):
        config = make_config("--cfg", str(CONFIGS / f"groupmixformer_{name}.yaml"))
        assert (config.DATA, config.TRAIN, config.AUG, config.TEST) == (
            reference.DATA, reference.TRAIN, reference.AUG, reference.TEST,
        )  # fmt: skip
