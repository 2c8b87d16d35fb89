"""Every configuration key with its default, unit and meaning; how a run's configuration is put together and checked.

A value comes from, later wins: the defaults below, the YAML files named in BASE, the YAML file, --opts, flags.
The defaults are the released recipe (GroupMixFormer-S, 300 epochs of ImageNet-1k).
"""

import argparse
import ast
import difflib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from .arguments import flag_values
from .errors import UserError, one_line

# split -> its folder, or its zip and map file without suffix, of each DATA.DATASET. A new data set is a line here.
SPLIT_NAMES = {
    "imagenet": {"train": "train", "val": "val"},
    "imagenet_21k": {"train": "imagenet21k_train", "val": "imagenet21k_val"},
}

_C = CfgNode()

_C.BASE = [""]  # YAML files that this one builds on; paths relative to it

# ---------------------------------------------------------------------------------------------------------------- data
_C.DATA = CfgNode()
_C.DATA.BATCH_SIZE = 128  # images per process (GPU) and step
_C.DATA.DATA_PATH = ""  # folder that holds train/ and val/ (or train.zip, train_map.txt, val.zip, val_map.txt)
_C.DATA.DATASET = "imagenet"  # a name in SPLIT_NAMES: 'imagenet', 'imagenet_21k'
_C.DATA.IMG_SIZE = 224  # input height and width, pixels
_C.DATA.INTERPOLATION = "bicubic"  # resizing: 'bicubic', 'bilinear', 'lanczos', 'nearest'; 'random' in training only
_C.DATA.ZIP_MODE = False  # read images from zip files
_C.DATA.CACHE_MODE = "part"  # zip files in memory: 'no', 'full' (all, in each process), 'part' (the process's share)
_C.DATA.PIN_MEMORY = True  # page-locked batches, for faster copies to the GPU; without a GPU it does nothing
_C.DATA.MAX_UNREADABLE = 10  # unreadable training images a process passes over in a run, each named; one more ends it
_C.DATA.FAST_LOADING = "no"  # 'train', 'all': decode, crop and resize uint8 tensors, erase batches; other bits
_C.DATA.NUM_WORKERS = 32  # loader processes per process, at most its share of the CPU cores

# --------------------------------------------------------------------------------------------------------------- model
_C.MODEL = CfgNode()
_C.MODEL.TYPE = "groupmixformer"  # the network family; there is one
_C.MODEL.NAME = "groupmixformer"  # names the run folder, <OUTPUT>/<MODEL.NAME>/<TAG>, and pretrained/<MODEL.NAME>.pth
_C.MODEL.RESUME = ""  # checkpoint to continue from
_C.MODEL.PRETRAINED = ""  # weights to start from
_C.MODEL.CLASS_MAP = ""  # text file, line i: the row of an ImageNet-21k head (21841) that is class i of this data set
_C.MODEL.LABEL_SMOOTHING = 0.1  # probability mass moved from the label to all classes, 0 to below 1

_C.MODEL.GMA = CfgNode()
_C.MODEL.GMA.IN_DIM = 3  # channels of the input
_C.MODEL.GMA.NUM_STAGES = 4  # stages; the lists below have one value each
_C.MODEL.GMA.NUM_CLASSES = 1000  # outputs; a run takes the number of classes of its data instead
_C.MODEL.GMA.EMBEDDING_DIMS = [80, 160, 320, 320]  # channels of each stage
_C.MODEL.GMA.SERIAL_DEPTHS = [2, 4, 12, 4]  # blocks of each stage
_C.MODEL.GMA.NUM_HEADS = 8  # attention heads in every block
_C.MODEL.GMA.GROUP_SIZES = [3, 5, 7]  # edges of the token groups; their number + 2 segments share the channels
_C.MODEL.GMA.MLP_RATIOS = [4, 4, 4, 4]  # hidden width of the MLP / channels, of each stage
_C.MODEL.GMA.QKV_BIAS = True  # bias of the projection to q, k and v
_C.MODEL.GMA.QKV_SCALE = None  # factor on the attended values; None: (channels / heads) ** -0.5
_C.MODEL.GMA.DROP_RATE = 0.0  # dropout after the attention's projection and in the MLP
_C.MODEL.GMA.ATTN_DROP_RATE = 0.0  # dropout on the softmax of k
_C.MODEL.GMA.DROP_PATH_RATE = 0.2  # stochastic depth of the last block, rising linearly from 0 in the first

# ------------------------------------------------------------------------------------------------------------ training
_C.TRAIN = CfgNode()
_C.TRAIN.START_EPOCH = 0  # first epoch of a run that does not resume, counted from 0
_C.TRAIN.EPOCHS = 300  # epochs in all
_C.TRAIN.WARMUP_EPOCHS = 20  # epochs of linear warm-up, part of EPOCHS
_C.TRAIN.WEIGHT_DECAY = 0.05  # not applied to biases and one-dimensional parameters
_C.TRAIN.BASE_LR = 5e-4  # learning rate at global batch 512, as the next two; used: x global batch / 512
_C.TRAIN.WARMUP_LR = 5e-7  # learning rate at update 0
_C.TRAIN.MIN_LR = 5e-6  # learning rate towards which 'cosine' and 'linear' fall
_C.TRAIN.LAYER_DECAY = 1.0  # factor on the learning rate from each block to the one before it; 1: the same for all
_C.TRAIN.HEAD_LR_SCALE = 1.0  # factor on the learning rate of the classifier
_C.TRAIN.CLIP_GRAD = 5.0  # largest L2 norm of all gradients together; 0: no clipping
_C.TRAIN.AUTO_RESUME = True  # continue from the newest checkpoint of the run folder
_C.TRAIN.ACCUMULATION_STEPS = 1  # batches whose gradients make one update
_C.TRAIN.MAX_NONFINITE_UPDATES = 10  # updates in a row that may be skipped because loss or gradients are not finite
_C.TRAIN.ALLOW_CHANGES = False  # continue a run although its recipe or data changed since the checkpoint
_C.TRAIN.USE_CHECKPOINT = False  # gradient checkpointing: blocks are recomputed in the backward pass

_C.TRAIN.LR_SCHEDULER = CfgNode()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # 'cosine', 'linear', 'step'; all by update
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30  # epochs between the steps of 'step'
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # factor of each step of 'step'

_C.TRAIN.OPTIMIZER = CfgNode()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # 'adamw', 'sgd' (Nesterov momentum)
_C.TRAIN.OPTIMIZER.EPS = 1e-8  # epsilon of AdamW
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)  # betas of AdamW
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9  # momentum of SGD

# ---------------------------------------------------------------------------------- moving average of the weights (EMA)
_C.EMA = CfgNode()
_C.EMA.ENABLED = True  # keep an average of weights and running statistics, evaluated beside the raw weights
_C.EMA.DECAY = 0.9999  # share of the old average at every update
_C.EMA.WARMUP = False  # let the decay rise from 0 to DECAY, for runs of few updates: 1 - (1 + update) ** (-2/3)

# -------------------------------------------------------------------------------------------------------- augmentation
_C.AUG = CfgNode()
_C.AUG.COLOR_JITTER = 0.4  # strength of colour jitter; timm applies it only where AUTO_AUGMENT is off
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # timm's policy string; 'none': off
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip
_C.AUG.REPROB = 0.25  # probability of random erasing
_C.AUG.REMODE = "pixel"  # what erased areas hold: 'pixel' (noise per pixel), 'rand' (one colour), 'const' (zeros)
_C.AUG.RECOUNT = 1  # areas erased
_C.AUG.MIXUP = 0.8  # alpha of mixup; 0: off
_C.AUG.CUTMIX = 1.0  # alpha of cutmix; 0: off
_C.AUG.CUTMIX_MINMAX = None  # [smallest, largest] side of the cut, as shares of the image; None: drawn from CUTMIX
_C.AUG.MIXUP_PROB = 1.0  # probability that a batch is mixed at all
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix where both are on
_C.AUG.MIXUP_MODE = "batch"  # one draw for each 'batch', 'pair' or 'elem'

# ---------------------------------------------------------------------------------------------------------- evaluation
_C.TEST = CfgNode()
_C.TEST.CROP = True  # resize the short side to IMG_SIZE * 256 / 224, then centre crop; False: resize to the square
_C.TEST.FUSE = False  # evaluate a network fused for inference: faster, equal up to rounding
_C.TEST.WEIGHTS = "best"  # of a checkpoint: 'raw', 'ema', or 'best': those that it was kept for, else raw
_C.TEST.SIZES = []  # evaluate at each of these input sizes, pixels; []: at DATA.IMG_SIZE
_C.TEST.TTA = "none"  # views of an image whose softmax is averaged: 'none', 'flip', 'five-crop', 'ten-crop' (+ flip)
_C.TEST.VAL_SET = ""  # ImageNet's other validation sets: 'real', 'v2', 'a', 'r'; '': the data set's own
_C.TEST.REAL_JSON = ""  # real.json with the labels of 'real'; '': timm's copy
_C.TEST.PREDICTIONS = "csv"  # form of the predictions file: 'csv', 'parquet' (needs pyarrow)

# ----------------------------------------------------------------------------------------------------------------- run
_C.COMPILE = False  # torch.compile, one block per stage: a minute at the start, faster steps; equal up to rounding
_C.AMP_OPT_LEVEL = ""  # 'O0': float32; 'O1', 'O2': autocast to AMP_DTYPE; '': O1 on a GPU, O0 on a CPU
_C.AMP_DTYPE = "bfloat16"  # 'bfloat16', or 'float16' with loss scaling
_C.OUTPUT = ""  # root of the run folders; '': output
_C.TAG = "default"  # name of the run
_C.SAVE_FREQ = 1  # epochs between checkpoints
_C.SAVE_KEEP = 3  # newest checkpoints of whole epochs kept beside the best one; 0: all
_C.SAVE_EVERY_UPDATES = 0  # also save within an epoch, every so many updates; 0: not
_C.SAVE_EVERY_MINUTES = 0.0  # also save within an epoch, every so many minutes; 0: not
_C.LOG_SAMPLES = False  # write the images of every update to samples_rank<r>.txt in the run folder
_C.PRINT_FREQ = 10  # updates between log lines
_C.SEED = 0  # of initial weights (SEED + rank), order, augmentation, mixup and stochastic depth
_C.DETERMINISTIC = False  # on GPUs, only kernels that give the same bits every time; slower
_C.DIST_TIMEOUT_SECONDS = 600  # how long a process waits for the others before it gives up
_C.EVAL_MODE = False  # evaluate only
_C.THROUGHPUT_MODE = False  # measure images/s only
_C.MODEL_FILE = "groupmixformer.py"  # file of models/ that is copied beside the run

# Keys of released YAML files that decide nothing here: accepted with a notice.
RETIRED_KEYS = {
    "MODEL.GMA.PATCH_SIZE": "the stem's stride of 4 is part of the network",
    "MODEL.GMA.PRETRAINED": "use MODEL.PRETRAINED",
    "LOCAL_RANK": "the launcher's environment decides",
}

# Keys whose default does not show their type.
_NUMBER_OR_NONE = ("MODEL.GMA.QKV_SCALE",)
_PAIR_OR_NONE = ("AUG.CUTMIX_MINMAX",)

Rule = tuple[Callable[[Any], bool], str]


def _at_least(low: float) -> Rule:
    return (lambda v: v >= low), f"must be at least {low}"


def _one_of(*names: str) -> Rule:
    return (lambda v: v in names), "must be one of " + ", ".join(repr(name) for name in names)


_SHARE: Rule = (lambda v: 0 <= v <= 1), "must lie between 0 and 1"
_BELOW_ONE: Rule = (lambda v: 0 <= v < 1), "must lie between 0 and below 1"
_POSITIVE: Rule = (lambda v: v > 0), "must be greater than 0"
_ALL_POSITIVE: Rule = (lambda v: len(v) > 0 and all(x > 0 for x in v)), "must be numbers greater than 0"
_FILE_NAME: Rule = (
    (lambda v: v not in ("", ".", "..") and not set(v) & set("/\\\0\n")),
    "names a folder or file: it must not be empty or hold a slash",
)

_RULES: dict[str, Rule] = {
    "DATA.BATCH_SIZE": _at_least(1),
    "DATA.DATASET": _one_of(*SPLIT_NAMES),
    "DATA.IMG_SIZE": _at_least(32),
    "DATA.INTERPOLATION": _one_of("bicubic", "bilinear", "lanczos", "nearest", "random"),
    "DATA.CACHE_MODE": _one_of("no", "full", "part"),
    "DATA.NUM_WORKERS": _at_least(0),
    "DATA.FAST_LOADING": _one_of("no", "train", "all"),
    "DATA.MAX_UNREADABLE": _at_least(0),
    "MODEL.TYPE": _one_of("groupmixformer"),
    "MODEL.NAME": _FILE_NAME,
    "MODEL.LABEL_SMOOTHING": _BELOW_ONE,
    "MODEL.GMA.IN_DIM": _at_least(1),
    "MODEL.GMA.NUM_STAGES": _at_least(1),
    "MODEL.GMA.NUM_CLASSES": _at_least(1),
    "MODEL.GMA.EMBEDDING_DIMS": _ALL_POSITIVE,
    "MODEL.GMA.SERIAL_DEPTHS": _ALL_POSITIVE,
    "MODEL.GMA.NUM_HEADS": _at_least(1),
    "MODEL.GMA.GROUP_SIZES": ((lambda v: all(x >= 3 and x % 2 for x in v)), "must be odd numbers of at least 3"),
    "MODEL.GMA.MLP_RATIOS": _ALL_POSITIVE,
    "MODEL.GMA.DROP_RATE": _BELOW_ONE,
    "MODEL.GMA.ATTN_DROP_RATE": _BELOW_ONE,
    "MODEL.GMA.DROP_PATH_RATE": _BELOW_ONE,
    "TRAIN.START_EPOCH": _at_least(0),
    "TRAIN.EPOCHS": _at_least(1),
    "TRAIN.WARMUP_EPOCHS": _at_least(0),
    "TRAIN.WEIGHT_DECAY": _at_least(0),
    "TRAIN.BASE_LR": _POSITIVE,
    "TRAIN.WARMUP_LR": _at_least(0),
    "TRAIN.MIN_LR": _at_least(0),
    "TRAIN.CLIP_GRAD": _at_least(0),
    "TRAIN.LAYER_DECAY": ((lambda v: 0 < v <= 1), "must be greater than 0 and at most 1"),
    "TRAIN.HEAD_LR_SCALE": _POSITIVE,
    "TRAIN.ACCUMULATION_STEPS": _at_least(1),
    "TRAIN.MAX_NONFINITE_UPDATES": _at_least(0),
    "TRAIN.LR_SCHEDULER.NAME": _one_of("cosine", "linear", "step"),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": _at_least(1),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": _POSITIVE,
    "TRAIN.OPTIMIZER.NAME": _one_of("adamw", "sgd"),
    "TRAIN.OPTIMIZER.EPS": _POSITIVE,
    "TRAIN.OPTIMIZER.BETAS": (
        (lambda v: len(v) == 2 and all(0 <= x < 1 for x in v)),
        "must be two numbers from 0 to below 1",
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": _BELOW_ONE,
    "EMA.DECAY": _BELOW_ONE,
    "AUG.COLOR_JITTER": _at_least(0),
    "AUG.HFLIP": _SHARE,
    "AUG.REPROB": _SHARE,
    "AUG.REMODE": _one_of("pixel", "rand", "const"),
    "AUG.RECOUNT": _at_least(1),
    "AUG.MIXUP": _at_least(0),
    "AUG.CUTMIX": _at_least(0),
    "AUG.CUTMIX_MINMAX": (
        (lambda v: v is None or (len(v) == 2 and 0 <= v[0] <= v[1] <= 1)),
        "must be None or two shares, the smaller first",
    ),
    "AUG.MIXUP_PROB": _SHARE,
    "AUG.MIXUP_SWITCH_PROB": _SHARE,
    "AUG.MIXUP_MODE": _one_of("batch", "pair", "elem"),
    "TEST.WEIGHTS": _one_of("best", "raw", "ema"),
    "TEST.SIZES": ((lambda v: all(x >= 32 for x in v)), "must be sizes of at least 32"),
    "TEST.VAL_SET": _one_of("", "real", "v2", "a", "r"),
    "TEST.PREDICTIONS": _one_of("csv", "parquet"),
    "TEST.TTA": _one_of("none", "flip", "five-crop", "ten-crop"),
    "AMP_OPT_LEVEL": _one_of("", "O0", "O1", "O2"),
    "AMP_DTYPE": _one_of("bfloat16", "float16"),
    "TAG": _FILE_NAME,
    "SAVE_FREQ": _at_least(1),
    "SAVE_KEEP": _at_least(0),
    "SAVE_EVERY_UPDATES": _at_least(0),
    "SAVE_EVERY_MINUTES": _at_least(0),
    "PRINT_FREQ": _at_least(1),
    "SEED": ((lambda v: 0 <= v < 2**63), "must lie between 0 and 2**63 - 1"),
    "DIST_TIMEOUT_SECONDS": _at_least(1),
    "MODEL_FILE": _FILE_NAME,
}


def get_config(args: argparse.Namespace, notify: Callable[[str], None] = print) -> CfgNode:
    """Put a run's configuration together, check it and freeze it.

    Args:
        args: the parsed command line (`configs.arguments.parse_args`).
        notify: is called with one line for each key or flag that is accepted and ignored.

    Raises UserError, one line that names file or option, key and value, for whatever is wrong.
    """
    config = _C.clone()
    _merge_file(config, Path(args.cfg), notify, seen=())
    if len(args.opts) % 2:
        raise UserError(f"--opts takes pairs of KEY and VALUE, but {args.opts[-1]!r} has no value")
    for key, value in zip(args.opts[::2], args.opts[1::2]):
        _set(config, key, value, "--opts", notify)
    flags = flag_values(args)
    for key, value in flags.items():
        _set(config, key, value, "the command line", notify)
    validate(config)
    if "DATA.CACHE_MODE" in flags and not config.DATA.ZIP_MODE:
        notify("--cache-mode has no effect without --zip: images are read from folders")
    config.freeze()
    return config


def with_num_classes(config: CfgNode, num_classes: int) -> CfgNode:
    """A copy of the frozen configuration whose network has `num_classes` outputs."""
    return with_values(config, {"MODEL.GMA.NUM_CLASSES": num_classes})


def with_values(config: CfgNode, values: dict[str, Any]) -> CfgNode:
    """A copy of the frozen configuration with other values of the right types, {'DATA.IMG_SIZE': 256}."""
    config = config.clone()
    config.defrost()
    config.merge_from_list([item for pair in values.items() for item in pair])
    config.freeze()
    return config


def config_keys(node: CfgNode = _C, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key in full with its value: ('TRAIN.LR_SCHEDULER.NAME', 'cosine')."""
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from config_keys(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def to_dict(node: CfgNode) -> dict[str, Any]:
    """The configuration as plain dictionaries, for JSON and YAML."""
    return {
        name: to_dict(value) if isinstance(value, CfgNode) else list(value) if isinstance(value, tuple) else value
        for name, value in node.items()
    }


def validate(config: CfgNode) -> None:
    """Raise UserError for the first value that no run could use."""
    for key, value in config_keys(config):
        if key in _RULES and not _RULES[key][0](value):
            raise UserError(f"{key} = {value!r}: {_RULES[key][1]}")
    gma, train = config.MODEL.GMA, config.TRAIN
    for name in ("EMBEDDING_DIMS", "SERIAL_DEPTHS", "MLP_RATIOS"):
        if len(gma[name]) != gma.NUM_STAGES:
            raise UserError(
                f"MODEL.GMA.{name} = {gma[name]}: needs one value per stage, MODEL.GMA.NUM_STAGES = {gma.NUM_STAGES}"
            )
    if config.TEST.TTA in ("five-crop", "ten-crop") and not config.TEST.CROP:
        raise UserError(f"TEST.TTA = {config.TEST.TTA!r}: needs TEST.CROP True: nothing is cropped without it")
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        raise UserError(
            f"TRAIN.WARMUP_EPOCHS = {train.WARMUP_EPOCHS}: must be fewer than TRAIN.EPOCHS = {train.EPOCHS}"
        )
    if train.START_EPOCH >= train.EPOCHS:
        raise UserError(f"TRAIN.START_EPOCH = {train.START_EPOCH}: must be less than TRAIN.EPOCHS = {train.EPOCHS}")


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: PyYAML would silently drop the first one, with the whole group below it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _merge_file(config: CfgNode, path: Path, notify: Callable[[str], None], seen: tuple[Path, ...]) -> None:
    """Merge a YAML file, after the files that its BASE names."""
    resolved = path.resolve()
    if resolved in seen:
        raise UserError(f"{path}: BASE leads back to the file itself")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file{_nearby_yaml(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold KEY: value pairs, holds a {type(content).__name__}")
    bases = content.pop("BASE", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: BASE = {bases!r}: must be a YAML file or a list of them")
    for base in bases:
        if base:
            _merge_file(config, path.parent / base, notify, (*seen, resolved))
    try:
        values = list(flatten(content))
    except RecursionError:
        raise UserError(f"{path}: not a configuration: a group of keys holds itself") from None
    for key, value in values:
        _set(config, key, value, str(path), notify)


def _nearby_yaml(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path(__file__).parent
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1, cutoff=0.4)
    return f"; did you mean {folder / near[0]}?" if near else ""


def flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what nested dictionaries hold as `config_keys` does: ('TRAIN.LR_SCHEDULER.NAME', 'cosine')."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _set(config: CfgNode, key: str, value: Any, origin: str, notify: Callable[[str], None]) -> None:
    """Set one key to a value of the right type, or say what is wrong with either."""
    if key in RETIRED_KEYS:
        notify(f"{origin}: {key} is ignored: {RETIRED_KEYS[key]}")
        return
    if key == "BASE":
        raise UserError(f"{origin}: BASE = {value!r}: is read from YAML files only; name that file with --cfg")
    known = dict(config_keys(_C))
    if key not in known:
        if any(name.startswith(f"{key}.") for name in known):
            raise UserError(f"{origin}: {key} = {value!r}: is a group of keys and takes no value itself")
        near = difflib.get_close_matches(key.upper(), known, n=1, cutoff=0.5)
        raise UserError(f"{origin}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
    *groups, name = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    try:
        node[name] = _coerce(key, value, known[key])
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{origin}: {key} = {value!r}: {error}") from None


def _coerce(key: str, value: Any, default: Any) -> Any:
    """Bring a value from YAML or the command line to the type of the key's default; ValueError says what it must be."""
    if isinstance(default, str):
        if isinstance(value, dict | list | tuple):
            raise ValueError("must be text")
        return "" if value is None else str(value)
    if isinstance(value, str):
        value = _parse_literal(value)
    if key in _NUMBER_OR_NONE:
        return None if value is None else _number(value)
    if key in _PAIR_OR_NONE:
        return None if value is None else [_number(x) for x in _sequence(value)]
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("must be True or False")
        return value
    if isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("must be a whole number")
        return value
    if isinstance(default, float):
        return float(_number(value))
    whole = key != "MODEL.GMA.MLP_RATIOS" and all(isinstance(x, int) for x in default)
    values = [_number(x) for x in _sequence(value)]
    if whole and not all(isinstance(x, int) for x in values):
        raise ValueError("must be a list of whole numbers")
    return type(default)(values)


def _parse_literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.lower() in ("none", "null", ""):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a number")
    return value


def _sequence(value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list such as [1, 2]")
    return list(value)
