"""Sizes of the networks against the published ones, and what shapes they take."""

from collections.abc import Callable

import pytest
import timm
import torch
from segmentation_data import small_config
from torch import nn

from configs import UserError, read_config
from tasks import keys_of
from tasks.segmentation.evaluation import count_multiply_adds
from tasks.segmentation.heads import SemanticFPN, UPerNet
from tasks.segmentation.network import Segmenter, check_one_step
from utils.optimizer import build_optimizer

# Millions of parameters and billions of multiply-adds of one image, as printed: Semantic FPN at 512 x 512, UPerNet of
# 512 channels without its auxiliary head at 512 x 2048, 150 classes.
SIZES = {
    ("miny", "semantic_fpn"): ("9.69", "28.2"),
    ("tiny", "semantic_fpn"): ("14.89", "40.8"),
    ("small", "semantic_fpn"): ("26.33", "48.3"),
    ("base", "semantic_fpn"): ("49.67", "113.2"),
    ("miny", "upernet"): ("32.8", "867"),
    ("tiny", "upernet"): ("38.6", "919"),
    ("small", "upernet"): ("50.6", "950"),
    ("base", "upernet"): ("75.0", "1212"),
}


class OnResNet(nn.Module):
    """A head on ResNet-50, whose sizes mmsegmentation has published."""

    def __init__(self, head: type[nn.Module], channels: int) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4))
        self.head = head([256, 512, 1024, 2048], 150, channels, 0.1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


def sizes_of(build: Callable[[], nn.Module], size: tuple[int, int]) -> tuple[float, float]:
    """Millions of parameters, and billions of multiply-adds at this size.

    All that is counted grows with the number of pixels, but for UPerNet's pooled maps, which do not grow at all. So two
    small sizes tell the count of any size that is a multiple of 32.
    """
    with torch.device("meta"):
        network = build()
    network.to_empty(device="cpu")
    one, two = (count_multiply_adds(network, (64, width))[""] for width in (64, 128))
    flops = one + (two - one) * (size[0] * size[1] // 64**2 - 1)
    return sum(p.numel() for p in network.parameters()) / 1e6, flops / 1e9


def test_heads_have_the_published_sizes_on_resnet_50():
    parameters, flops = sizes_of(lambda: OnResNet(SemanticFPN, 256), (512, 512))
    assert (f"{parameters:.2f}", f"{flops:.1f}") == ("28.50", "44.3")
    parameters, flops = sizes_of(lambda: OnResNet(UPerNet, 512), (512, 2048))
    assert (f"{parameters:.1f}", f"{flops:.0f}") == ("64.1", "946")


@pytest.mark.parametrize(("variant", "head"), SIZES)
def test_the_shipped_networks_have_the_sizes_of_the_table(variant, head):
    config = read_config(["--cfg", f"configs/segmentation/{head}_groupmixformer_{variant}_ade20k.yaml"], keys_of)
    parameters, flops = sizes_of(lambda: Segmenter(config, auxiliary=False), tuple(config.TEST.MEASURE))
    digits = (2, 1) if head == "semantic_fpn" else (1, 0)
    assert (f"{parameters:.{digits[0]}f}", f"{flops:.{digits[1]}f}") == SIZES[variant, head]


# Head -> updates, learning rate for 16 images, weight decay, power of poly, weight of the auxiliary head.
RECIPES = {"upernet": (160_000, 6e-5, 0.01, 1.0, 0.4), "semantic_fpn": (80_000, 1e-4, 1e-4, 0.9, 0.0)}


@pytest.mark.parametrize(("variant", "head"), SIZES)
def test_the_cards_train_as_their_relatives_do(variant, head):
    config = read_config(["--cfg", f"configs/segmentation/{head}_groupmixformer_{variant}_ade20k.yaml"], keys_of)
    train, schedule = config.TRAIN, config.TRAIN.LR_SCHEDULER
    recipe = (train.UPDATES, train.BASE_LR, train.WEIGHT_DECAY, schedule.POWER, config.MODEL.AUX_WEIGHT)
    assert recipe == RECIPES[head] and schedule.NAME == "poly" and train.REFERENCE_BATCH == 16
    assert not config.EMA.ENABLED


def test_counting_needs_no_computation():
    network = Segmenter(small_config("MODEL.HEAD", "upernet"), auxiliary=False)
    counts = count_multiply_adds(network, (64, 96))
    assert counts == count_multiply_adds(network.to("meta"), (64, 96))
    assert counts[""] == counts["backbone"] + counts["head"] > 0


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet", "smp:Unet", "smp:FPN", "smp:Segformer"])
@pytest.mark.parametrize("size", [(64, 64), (33, 95)])
def test_any_size_gives_logits_of_that_size(head, size):
    torch.manual_seed(0)
    network = Segmenter(small_config("MODEL.HEAD", head, "MODEL.GMA.NUM_CLASSES", "5"))
    images = torch.randn(2, 3, *size)
    assert [tuple(x.shape) for x in network.train()(images)] == [(2, 5, *size)] * 2
    sum(x.sum() for x in network(images)).backward()
    assert all(p.grad is not None for p in network.parameters())  # or DDP waits for what never comes
    assert network.eval()(images).shape == (2, 5, *size)


def test_one_image_a_batch_works_or_is_refused_before_training():
    with pytest.raises(UserError, match=r"^--batch-size: .*cannot train on 1 image.*; give at least 2") as caught:
        check_one_step(Segmenter(small_config("MODEL.HEAD", "upernet")), 1, (64, 64))
    assert "\n" not in str(caught.value)
    check_one_step(Segmenter(small_config("MODEL.HEAD", "upernet")), 2, (64, 64))
    check_one_step(Segmenter(small_config("MODEL.HEAD", "semantic_fpn")), 1, (64, 64))


def test_an_unknown_decoder_is_named_in_one_line():
    with pytest.raises(UserError, match=r"MODEL.HEAD = 'smp:Nonesuch': segmentation_models_pytorch has Unet, "):
        Segmenter(small_config("MODEL.HEAD", "smp:Nonesuch"))


def test_layer_decay_reaches_the_backbone_and_spares_the_heads():
    network = Segmenter(small_config("MODEL.STAGE_NORM", "layer"))
    config = small_config("TRAIN.LAYER_DECAY", "0.5")
    groups = build_optimizer(config, network, lr=1.0).param_groups
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert all(scale == 1 for name, scale in scales.items() if not name.startswith("backbone.body."))
    assert scales["backbone.body.conv_stem.proj1.weight"] == min(scales.values())
    blocks = [scales[f"backbone.body.groupmixformer_backbone.{stage}.gma_stage.0.norm1.weight"] for stage in range(4)]
    assert blocks == sorted(blocks) and len(set(blocks)) == 4 and blocks[-1] < 1
