"""The configuration keys that detection has beside those of `configs.keys`."""

from configs.keys import SHARE, Key, Rule, at_least, between, launch, network, one_of, process, recipe
from tasks.backbone import KEYS as BACKBONE_KEYS

DETECTORS = ("mask_rcnn", "faster_rcnn", "retinanet")
_SIZES = Rule(lambda sizes, _: sizes and all(32 <= x <= 2**15 for x in sizes), f"must be sizes from 32 to {2**15}")
_PYRAMID_LEVELS = 5  # of every detector here
_CROP = Rule(
    lambda sizes, _: not sizes or (len(sizes) == 2 and 0 < sizes[0] <= sizes[1]),
    "must be [] or two sizes greater than 0, the smaller first",
)
_ONE_A_LEVEL = Rule(
    lambda sizes, _: len(sizes) == _PYRAMID_LEVELS, f"needs {_PYRAMID_LEVELS} sizes, one per level of the pyramid"
)

# fmt: off
KEYS: dict[str, Key] = {
    **BACKBONE_KEYS,
    "DATA.TRAIN_JSON": process("", "COCO JSON of the training images, below --data-path; default: COCO's names"),
    "DATA.TRAIN_IMAGES": process("", "their folder, below --data-path; default: train2017, train, images or the like"),
    "DATA.VAL_JSON": process("", "COCO JSON of the validation images, as DATA.TRAIN_JSON"),
    "DATA.VAL_IMAGES": process("", "their folder, as DATA.TRAIN_IMAGES"),
    "DATA.MIN_SIZES": recipe([800], "short side of training images, pixels; one of these is drawn", _SIZES),
    "DATA.MAX_SIZE": recipe(1333, "longest side of training images, pixels", at_least(1)),
    "DATA.CROP": recipe(
        [], "[smallest, largest] side of a random crop that half of the training images go through; []: none", _CROP),
    "DATA.CROP_MIN_SIZES": recipe(
        [400, 500, 600], "short side of an image before that crop; one of these is drawn", _SIZES),
    "AUG.HFLIP": recipe(0.5, "probability of a horizontal flip", SHARE),
    "MODEL.DETECTOR": network("mask_rcnn", "torchvision's detector", one_of(*DETECTORS)),
    "MODEL.PYRAMID_CHANNELS": network(256, "channels of the feature pyramid and of convolutions in heads", at_least(1)),
    "MODEL.ANCHOR_SIZES": network(
        [32, 64, 128, 256, 512], "edge of the anchors on each level of the pyramid, pixels",
        between(1, 2**15), _ONE_A_LEVEL),
    "TRAIN.REGIONS": recipe(512, "regions of an image that mask_rcnn and faster_rcnn learn from", at_least(1)),
    "TEST.MIN_SIZE": network(800, "short side of evaluated images, pixels", at_least(1)),
    "TEST.MAX_SIZE": network(1333, "longest side of evaluated images, pixels", at_least(1)),
    "TEST.MAX_DETECTIONS": launch(100, "detections kept per image; COCO counts at most 100", at_least(1)),
    "TEST.DRAW_SCORE": launch(0.5, "lowest score of detections that are drawn", SHARE),
}
# fmt: on
