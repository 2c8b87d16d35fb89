"""The configuration keys of semantic segmentation; defaults are UPerNet's on ADE20K, as its relatives train it."""

import re

from configs.keys import BELOW_ONE, SHARE, Key, Rule, at_least, launch, network, one_of, process, recipe

from ..backbone import KEYS as BACKBONE_KEYS

_HEADS = ("semantic_fpn", "upernet")
_HEAD = Rule(
    lambda value, _: value in _HEADS or re.fullmatch(r"smp:\w+", value) is not None,
    "must be 'semantic_fpn', 'upernet' or 'smp:<Name>', a decoder of segmentation_models_pytorch such as smp:Unet",
)
_TWO_SIZES = Rule(
    lambda values, _: len(values) == 2 and all(x >= 32 for x in values), "must be [height, width], at least 32 each"
)
_SCALES = Rule(
    lambda values, _: len(values) == 2 and 0 < values[0] <= values[1], "must be two factors, the smaller first"
)
_FACTORS = Rule(lambda values, _: values and all(x > 0 for x in values), "must be factors greater than 0")
_SHORT_SIDE = Rule(lambda value, _: value == 0 or value >= 32, "must be 0 or at least 32")
_STRIDE = Rule(
    lambda values, config: len(values) == 2 and all(0 < x <= size for x, size in zip(values, config.TEST.WINDOW)),
    "must be [down, right], at most TEST.WINDOW = {TEST.WINDOW}",
)
_OFF = Rule(lambda value, _: not value, "segmentation cannot do this; leave it out")
_RAW_LABEL = Rule(lambda value, _: -1 <= value <= 65535, "must be a mask's value, or -1 for none")

# fmt: off
KEYS: dict[str, Key] = {
    **BACKBONE_KEYS,
    # ------------------------------------------------------------------------------------------------------------ data
    "DATA.BATCH_SIZE": process(2, "training images per process (GPU) and step", at_least(1), flag="--batch-size"),
    "DATA.DATA_PATH": process(
        "", "folder of the data set: ADE20K's layout, Cityscapes' names, or train/ and val/ with images/ and masks/",
        flag="--data-path"),
    "DATA.TRAIN_IMAGES": process("", "folder of training images below the data path; default: by the layout"),
    "DATA.TRAIN_MASKS": process("", "folder of training masks; likewise"),
    "DATA.VAL_IMAGES": process("", "folder of validation images; likewise"),
    "DATA.VAL_MASKS": process("", "folder of validation masks; likewise"),
    "DATA.CLASSES": process("", "text file, a class name a line; default: classes.txt in the data path"),
    "DATA.IGNORE_LABEL": network(255, "value in masks of pixels that count nowhere; -1: none", _RAW_LABEL),
    "DATA.REDUCE_ZERO_LABEL": network(False, "value 0 in masks counts nowhere, and class c has the value c + 1"),
    "DATA.IMG_SIZE": network(
        512, "short side to which images are resized, pixels; 0: as they are", _SHORT_SIDE),
    "DATA.MAX_LONG_SIDE": network(2048, "largest long side after that, pixels", at_least(32)),
    "DATA.ZIP_MODE": process(False, "not for segmentation, which reads folders", _OFF, flag="--zip"),
    # ----------------------------------------------------------------------------------------------------------- model
    "MODEL.GMA.NUM_CLASSES": network(150, "outputs; a run takes the number of classes of its data", at_least(1)),
    "MODEL.HEAD": network("upernet", "semantic_fpn, upernet, or a decoder of segmentation_models_pytorch: smp:<Name>",
                         _HEAD),
    "MODEL.HEAD_CHANNELS": network(512, "width of the head (UPerNet 512, Semantic FPN 256)", at_least(8)),
    "MODEL.HEAD_DROPOUT": recipe(0.1, "dropout of whole channels before a head's classifier", BELOW_ONE),
    "MODEL.AUX_WEIGHT": network(
        0.4, "weight in the loss of an auxiliary FCN head on stage 3; 0: no such head", at_least(0)),
    # -------------------------------------------------------------------------------------------------------- training
    "TRAIN.REFERENCE_BATCH": recipe(16, "images of an update that the learning rates are meant for", at_least(1)),
    "TRAIN.RECIPE_BATCH": launch(
        0, "images of an update in the recipe; a run with others gets a warning; 0: none", at_least(0)),
    # ---------------------------------------------------------------------------------------------------- augmentation
    "AUG.SCALE": recipe([0.5, 2.0], "range of the factor on the resized image", _SCALES, kind="numbers"),
    "AUG.CROP": recipe([512, 512], "height and width of training crops, pixels", _TWO_SIZES),
    "AUG.MAX_SHARE": recipe(0.75, "largest share of one class in a crop; ten crops are tried", SHARE),
    "AUG.HFLIP": recipe(0.5, "probability of a horizontal flip", SHARE),
    "AUG.PHOTOMETRIC": recipe(True, "distort brightness, contrast, saturation and hue"),
    # ------------------------------------------------------------------------------------------------------ evaluation
    "TEST.MODE": launch("whole", "predict the whole image, or windows that slide over it", one_of("whole", "slide"),
                        flag="--mode"),
    "TEST.WINDOW": launch([512, 512], "height and width of the windows of 'slide', pixels", _TWO_SIZES),
    "TEST.STRIDE": launch([341, 341], "steps of the windows, down and right, pixels", _STRIDE),
    "TEST.SCALES": launch([1.0], "factors on the resized image whose probabilities are averaged; test.py only",
                          _FACTORS, kind="numbers"),
    "TEST.FLIP": launch(False, "average with the mirrored image; test.py only", flag="--flip"),
    "TEST.ABSENT_CLASSES": launch(
        "skip", "mIoU of a class that is predicted but in no mask: leave it out, or count 0 as mmsegmentation does",
        one_of("skip", "zero")),
    "TEST.SAVE_MASKS": launch(
        False, "save each prediction as a PNG, with the values of the data set's own masks", flag="--save-masks"),
    "TEST.MEASURE": launch([512, 2048], "height and width for --flops and --throughput, pixels", _TWO_SIZES),
    "TEST.FUSE": launch(False, "not for segmentation", _OFF, flag="--fuse"),
    "COMPILE": recipe(False, "not for segmentation", _OFF, flag="--compile"),
}
# fmt: on
