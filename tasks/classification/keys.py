"""The configuration keys that classification has beside those of `configs.keys`; defaults are the released recipe."""

from itertools import pairwise

from configs import edges, image_size
from configs.keys import (
    BELOW_ONE,
    SHARE,
    Key,
    Rule,
    at_least,
    between,
    in_one_order,
    launch,
    network,
    one_of,
    process,
    recipe,
)

_MINMAX = Rule(
    lambda values, _: values is None or (len(values) == 2 and 0 <= values[0] <= values[1] <= 1),
    "must be None or two shares, the smaller first",
)


def _rising_pair(low: float, high: float) -> Rule:
    return Rule(
        lambda values, _: len(values) == 2 and low <= values[0] <= values[1] <= high,
        f"must be two numbers between {low} and {high}, the smaller first",
    )


_NOT_ZIPPED = Rule(
    lambda value, config: not value or not config.DATA.ZIP_MODE,
    "images of label files are read from folders; leave --zip out",
)
_CROPS_ONLY_IF_CROPPED = Rule(
    lambda value, config: config.TEST.CROP or value not in ("five-crop", "ten-crop"),
    "needs TEST.CROP True: nothing is cropped without it",
)
_WEIGHTS = Rule(
    lambda value, _: (
        value in ("", "balanced", "effective")
        or (isinstance(value, list) and any(value) and all(0 <= weight <= 1e6 for weight in value))
    ),
    "must be '', 'balanced', 'effective' or a list of weights from 0 to 1e6, one for each class",
)
_OF_BCE = Rule(lambda value, config: value is None or config.LOSS.NAME == "bce", "is for LOSS.NAME 'bce'; set that")
_THRESHOLD = Rule(lambda value, _: value is None or 0 <= value < 1, "must be None or lie between 0 and below 1")
_EPOCHS_RISE = Rule(
    lambda pairs, config: (
        not pairs
        or (
            pairs[0][1] == 0
            and all(one[1] < next_one[1] for one, next_one in pairwise(pairs))
            and pairs[-1][1] < config.TRAIN.EPOCHS
        )
    ),
    "first epochs must rise from 0 and be less than TRAIN.EPOCHS = {TRAIN.EPOCHS}",
)
_ARE_NOT_PADDED = Rule(  # `transforms.SMALL_IMAGE`
    lambda pairs, config: all(
        32 < edge <= largest for size, _ in pairs for edge, largest in zip(edges(size), image_size(config))
    ),
    "each size must lie between 33 and DATA.IMG_SIZE = {DATA.IMG_SIZE}",
)
_COUNTS_EPOCHS = Rule(
    lambda value, config: not value or not (config.TRAIN.UPDATES or config.TRAIN.WARMUP_UPDATES),
    "counts epochs, so the run must too; set TRAIN.UPDATES 0 and TRAIN.WARMUP_UPDATES 0",
)
_HAS_WEIGHTS = Rule(
    lambda name, config: not name or config.DISTILL.WEIGHTS, "needs a file of its weights in DISTILL.WEIGHTS"
)
_HAS_TEACHER = Rule(
    lambda path, config: not path or config.DISTILL.TEACHER,
    "are weights of a teacher; name its network in DISTILL.TEACHER, or leave them out",
)

# fmt: off
KEYS: dict[str, Key] = {
    "DATA.INTERPOLATION": network(
        "bicubic", "resizing; 'random' in training only",
        one_of("bicubic", "bilinear", "lanczos", "nearest", "random")),
    "DATA.TRAIN_SIZES": recipe(
        [], "image sizes of training and the epoch from which each is used, [[128, 0], [192, 100]]; []: IMG_SIZE",
        _EPOCHS_RISE, _ARE_NOT_PADDED, _COUNTS_EPOCHS, kind="sizes"),
    "DATA.SCALE_BATCH": recipe(
        True, "with TRAIN_SIZES, smaller images come in larger batches, of as many pixels; BATCH_SIZE is for IMG_SIZE"),
    "DATA.FAST_LOADING": recipe(
        "no", "decode, crop and resize uint8 tensors, erase batches, to train or always; other bits",
        one_of("no", "train", "all")),
    "DATA.TRAIN_LABELS": process(
        "", "CSV or Parquet file of the training images instead of folders: columns path (below --data-path), class",
        _NOT_ZIPPED, kind="file"),
    "DATA.VAL_LABELS": process("", "the same of the validation images", _NOT_ZIPPED, kind="file"),
    "DATA.MULTI_LABEL": network(
        False, "images have several classes or none, with | between their names in label files; mAP decides"),
    "DATA.VAL_SHARE": network(
        0.0, "share of the training images that validates, chosen by content, where there are no others; 0: none",
        BELOW_ONE),
    "DATA.CLASS_BALANCE": recipe(
        0.0, "how evenly training sees the classes: 0 as there are images, 0.5 by square roots, 1 equally often", SHARE,
        in_one_order(off=0)),
    "MODEL.CLASS_MAP": process(
        "", "text file, line i: the row of an ImageNet-21k head (21841) that is class i here", kind="file"),
    "DATA.CLASS_NAMES": process(
        "", "names of the classes for --images: a text file, line i: that of class i; or imagenet, its 1000",
        flag="--class-names"),
    "MODEL.LABEL_SMOOTHING": recipe(0.1, "probability mass moved from the label to all classes", BELOW_ONE),
    # ------------------------------------------------------------------------------------------------------------ loss
    "LOSS.NAME": recipe(
        "ce", "cross-entropy, or binary cross-entropy of each class, the mean over classes (timm's)",
        one_of("ce", "bce")),
    "LOSS.BCE_THRESHOLD": recipe(
        None, "targets above it become 1, others 0, mixed ones too; None: as they are", _THRESHOLD, _OF_BCE,
        kind="number or None"),
    "LOSS.CLASS_WEIGHTS": recipe(
        "", "factor on the loss of each class: 'balanced', 'effective' (number of images) or a list; '': none",
        _WEIGHTS, kind="name or numbers"),
    "LOSS.EFFECTIVE_BETA": recipe(0.999, "beta of CLASS_WEIGHTS 'effective'", BELOW_ONE),
    "DISTILL.TEACHER": recipe(
        "", "timm's name of a trained network whose outputs are learnt beside the labels; '': none", _HAS_WEIGHTS),
    "DISTILL.WEIGHTS": recipe(
        "", "file of the teacher's weights, for the classes of the data", _HAS_TEACHER, kind="file"),
    "DISTILL.KIND": recipe(
        "soft", "learn the teacher's probabilities, or its most probable class", one_of("soft", "hard")),
    "DISTILL.WEIGHT": recipe(0.5, "the teacher's share of the loss; the labels' is the rest", SHARE),
    "DISTILL.TEMPERATURE": recipe(1.0, "divides logits of 'soft' before their softmax", between(0.1, 100)),
    # ---------------------------------------------------------------------------------------------------- augmentation
    "AUG.CROP_SCALE": recipe(
        [0.08, 1.0], "area of the random crop, as share of the image: [smallest, largest]", _rising_pair(0.001, 1)),
    "AUG.CROP_RATIO": recipe(
        [3 / 4, 4 / 3], "width / height of the random crop: [smallest, largest]", _rising_pair(0.01, 100)),
    "AUG.COLOR_JITTER": recipe(0.4, "strength of colour jitter; only without AUTO_AUGMENT, or with 3a", at_least(0)),
    "AUG.AUTO_AUGMENT": recipe(
        "rand-m9-mstd0.5-inc1",
        "timm's policy string: RandAugment (rand-...), 3-Augment (3a), AugMix (augmix-m3-w3), ...; 'none': off"),
    "AUG.HFLIP": recipe(0.5, "probability of a horizontal flip", SHARE),
    "AUG.VFLIP": recipe(0.0, "probability of a vertical flip", SHARE),
    "AUG.GRAYSCALE_PROB": recipe(0.0, "probability that an image loses its colours", SHARE),
    "AUG.GAUSSIAN_BLUR_PROB": recipe(0.0, "probability of a blur", SHARE),
    "AUG.REPROB": recipe(0.25, "probability of random erasing", SHARE),
    "AUG.REMODE": recipe(
        "pixel", "erased areas: noise per pixel, one random colour, or zeros", one_of("pixel", "rand", "const")),
    "AUG.RECOUNT": recipe(1, "areas erased", at_least(1)),
    "AUG.MIXUP": recipe(0.8, "alpha of mixup; 0: off", at_least(0)),
    "AUG.CUTMIX": recipe(1.0, "alpha of cutmix; 0: off", at_least(0)),
    "AUG.CUTMIX_MINMAX": recipe(
        None, "[smallest, largest] side of the cut, as shares of the image; None: drawn from CUTMIX", _MINMAX,
        kind="pair or None"),
    "AUG.MIXUP_PROB": recipe(1.0, "probability that a batch is mixed at all", SHARE),
    "AUG.MIXUP_SWITCH_PROB": recipe(0.5, "probability of cutmix where both are on", SHARE),
    "AUG.MIXUP_OFF_EPOCH": recipe(0, "epoch, counted from 0, from which nothing is mixed; 0: none", at_least(0)),
    "AUG.MIXUP_MODE": recipe("batch", "one draw for each batch, pair or image", one_of("batch", "pair", "elem")),
    # ------------------------------------------------------------------------------------------------------ evaluation
    "TEST.CROP": network(
        True, "resize until IMG_SIZE * 256 / 224 is covered, then crop the centre; False: resize to IMG_SIZE itself"),
    "TEST.SIZES": launch(
        [], "evaluate at each of these input sizes, pixels; default: DATA.IMG_SIZE", between(32, 2**15),
        flag="--sizes"),
    "TEST.TTA": launch(
        "none", "average the softmax of several views of an image; ten-crop: five, and mirrored",
        one_of("none", "flip", "five-crop", "ten-crop"), _CROPS_ONLY_IF_CROPPED, flag="--tta"),
    "TEST.VAL_SET": launch(
        "", "validate on ImageNet with ReaL labels, ImageNet-V2, -A or -R, which --data-path is then",
        one_of("", "real", "v2", "a", "r"), flag="--val-set"),
}
# fmt: on
