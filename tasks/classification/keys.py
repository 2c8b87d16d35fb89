"""The configuration keys that classification has beside those of `configs.keys`; defaults are the released recipe."""

from configs.keys import BELOW_ONE, SHARE, Key, Rule, at_least, between, launch, network, one_of, process, recipe

_MINMAX = Rule(
    lambda values, _: values is None or (len(values) == 2 and 0 <= values[0] <= values[1] <= 1),
    "must be None or two shares, the smaller first",
)
_CROPS_ONLY_IF_CROPPED = Rule(
    lambda value, config: config.TEST.CROP or value not in ("five-crop", "ten-crop"),
    "needs TEST.CROP True: nothing is cropped without it",
)

# fmt: off
KEYS: dict[str, Key] = {
    "DATA.INTERPOLATION": network(
        "bicubic", "resizing; 'random' in training only",
        one_of("bicubic", "bilinear", "lanczos", "nearest", "random")),
    "DATA.FAST_LOADING": recipe(
        "no", "decode, crop and resize uint8 tensors, erase batches, to train or always; other bits",
        one_of("no", "train", "all")),
    "MODEL.CLASS_MAP": process(
        "", "text file, line i: the row of an ImageNet-21k head (21841) that is class i here", kind="file"),
    "DATA.CLASS_NAMES": process(
        "", "names of the classes for --images: a text file, line i: that of class i; or imagenet, its 1000",
        flag="--class-names"),
    "MODEL.LABEL_SMOOTHING": recipe(0.1, "probability mass moved from the label to all classes", BELOW_ONE),
    # ---------------------------------------------------------------------------------------------------- augmentation
    "AUG.COLOR_JITTER": recipe(0.4, "strength of colour jitter; only without AUTO_AUGMENT", at_least(0)),
    "AUG.AUTO_AUGMENT": recipe("rand-m9-mstd0.5-inc1", "timm's policy string; 'none': off"),
    "AUG.HFLIP": recipe(0.5, "probability of a horizontal flip", SHARE),
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
