"""One card for each configuration key that all tasks share. The keys of one task stand in `tasks/<task>/keys.py`.

The defaults are the released recipe (GroupMixFormer-S, 300 epochs of ImageNet-1k). A card is made by the name of what
its value belongs to:

    network   what a trained network is and what it is shown: as recipe, and kept with the weights. An evaluation takes
              it from the checkpoint where no --cfg is given, and says where --cfg differs
    recipe    what else is computed: may not change when a run resumes; all processes must have the same value
    launch    one launch of the run: may change when it resumes; all processes must have the same value
    process   one process: may change when the run resumes; each process may have its own value
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yacs.config import CfgNode

# data set -> folder of each split, or its zip and map file without suffix. A new data set is a line here.
SPLIT_NAMES = {
    "imagenet": {"train": "train", "val": "val"},
    "imagenet_21k": {"train": "imagenet21k_train", "val": "imagenet21k_val"},
}

# Of the keys made by `network`, those that change no result: one is a name, and data and weights decide the other.
CHANGE_NO_RESULT = ("MODEL.NAME", "MODEL.GMA.NUM_CLASSES")

# Keys of released YAML files that decide nothing here: accepted with a notice.
RETIRED_KEYS = {
    "MODEL.GMA.PATCH_SIZE": "the stem's stride of 4 is part of the network",
    "MODEL.GMA.PRETRAINED": "use MODEL.PRETRAINED",
    "LOCAL_RANK": "the launcher's environment decides",
    "TEST.PREDICTIONS": "predictions are written as CSV",
    "TEST.REAL_JSON": "ReaL's labels are timm's copy",
}


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Args:
        accepts: of the value and the whole configuration.
        demand: ends the message for a value that is refused. It may show other keys' values, such as {TRAIN.EPOCHS}.
        choices: all values that are accepted, where these are a few names.
    """

    accepts: Callable[[Any, CfgNode], bool]
    demand: str
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Key:
    """The card of one key.

    Args:
        default: its type is the type of the key.
        meaning: what the key decides, with its unit; also the help of its flag.
        rules: what a value of that type must be.
        scope: 'network', 'recipe', 'launch' or 'process', what the value belongs to.
        flag: its short name on the command line of train.py and test.py; '' for none.
        kind: 'number', 'number or None', 'pair or None', 'numbers', 'name or numbers', 'size' (a whole number, or two:
            [height, width]), 'sizes' (a list of [size, epoch]), 'switch' (True, False or a name) or 'file' (one that
            must exist), where the default does not show the type.
        follows: in one configuration: what its value follows from, because nobody has set it; '' where somebody has.
    """

    default: Any
    meaning: str
    rules: tuple[Rule, ...]
    scope: str
    flag: str
    kind: str
    follows: str = ""

    @property
    def may_change_on_resume(self) -> bool:
        return self.scope not in ("network", "recipe")

    @property
    def kept_with_weights(self) -> bool:
        return self.scope == "network"

    @property
    def same_on_all_ranks(self) -> bool:
        return self.scope != "process"


def _card_maker(scope: str) -> Callable[..., Key]:
    def card(default: Any, meaning: str, *rules: Rule, flag: str = "", kind: str = "") -> Key:
        return Key(default, meaning, rules, scope, flag, kind)

    return card


network, recipe, launch, process = (_card_maker(scope) for scope in ("network", "recipe", "launch", "process"))


# --------------------------------------------------------------------------------------------------------------- rules
def at_least(low: float) -> Rule:
    return Rule(lambda value, _: value >= low, f"must be at least {low}")


def between(low: float, high: float) -> Rule:
    """For a number or a list of numbers: beyond these the program would fail in its own way, or never begin."""

    def accepts(value: Any, _: CfgNode) -> bool:
        return all(low <= number <= high for number in (value if isinstance(value, list) else [value]))

    return Rule(accepts, f"must lie between {low} and {high}")


def one_of(*names: Any) -> Rule:
    return Rule(lambda value, _: value in names, "must be one of " + ", ".join(map(repr, names)), names)


SHARE = Rule(lambda value, _: 0 <= value <= 1, "must lie between 0 and 1")
BELOW_ONE = Rule(lambda value, _: 0 <= value < 1, "must lie between 0 and below 1")
POSITIVE = Rule(lambda value, _: value > 0, "must be greater than 0")
FILE_NAME = Rule(
    lambda value, _: (
        value not in ("", ".", "..")
        and not set(value) & set("/\\\0\n")
        and len(value.encode(errors="surrogateescape")) <= 200  # the system takes 255, and suffixes come behind
    ),
    "names a folder or file: it must not be empty, hold a slash or have more than 200 bytes",
)
_CHANNELS = Rule(
    lambda value, _: value in (1, 3),
    "must be 3 (colour) or 1 (grey); other channels need a task of your own: docs/development.md",
)
_SEED = Rule(lambda value, _: 0 <= value < 2**63, "must lie between 0 and 2**63 - 1")
_ODD = Rule(
    lambda values, _: values and all(3 <= x < 100 and x % 2 for x in values), "must be odd numbers from 3 to below 100"
)
_BETAS = Rule(
    lambda values, _: len(values) == 2 and all(0 <= x < 1 for x in values), "must be two numbers from 0 to below 1"
)
_PER_STAGE = Rule(
    lambda values, config: len(values) == config.MODEL.GMA.NUM_STAGES,
    "needs one value per stage, MODEL.GMA.NUM_STAGES = {MODEL.GMA.NUM_STAGES}",
)


def in_one_order(off: float) -> Rule:
    """For a key that needs one order over all images, unless its value is `off`."""
    return Rule(
        lambda value, config: value == off or not (config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part"),
        "needs every image in every process; set DATA.CACHE_MODE 'no' or 'full'",
    )


# Where TRAIN.UPDATES decides, the data say how many epochs that is: `utils.schedule.run_length` checks.
_BEFORE_THE_END = Rule(
    lambda epoch, config: config.TRAIN.UPDATES or epoch < config.TRAIN.EPOCHS,
    "must be less than TRAIN.EPOCHS = {TRAIN.EPOCHS}",
)
_WARMUP_ENDS = Rule(
    lambda epochs, config: config.TRAIN.WARMUP_UPDATES or _BEFORE_THE_END.accepts(epochs, config),
    _BEFORE_THE_END.demand,
)
_UPDATE_BEFORE_THE_END = Rule(
    lambda update, config: not config.TRAIN.UPDATES or update < config.TRAIN.UPDATES,
    "must be less than TRAIN.UPDATES = {TRAIN.UPDATES}",
)
_ABOVE_MIN_LR = Rule(
    lambda rate, config: config.TRAIN.LR_SCHEDULER.NAME in ("step", "multistep") or rate >= config.TRAIN.MIN_LR,
    "the rate would rise to TRAIN.MIN_LR = {TRAIN.MIN_LR}; lower that as well",
)
_ABOVE_WARMUP_LR = Rule(
    lambda rate, config: (
        rate >= config.TRAIN.WARMUP_LR or not (config.TRAIN.WARMUP_EPOCHS or config.TRAIN.WARMUP_UPDATES)
    ),
    "the warm-up would begin above it, at TRAIN.WARMUP_LR = {TRAIN.WARMUP_LR}; lower that as well",
)
_NOT_COMPILED = Rule(
    lambda value, config: value != "selective" or not config.COMPILE,
    "the compiler chooses what to keep by itself; set COMPILE_MEMORY instead",
)
_FROZEN_PART = Rule(
    lambda part, config: part in {"", "backbone", *map(str, range(1, config.MODEL.GMA.NUM_STAGES + 1))},
    "must be '', 'backbone' or a number of stages from 1 to MODEL.GMA.NUM_STAGES = {MODEL.GMA.NUM_STAGES}",
)
_OWN_ARGUMENTS = Rule(
    lambda name, config: (
        name in ("adamw", "sgd")
        or all(config.TRAIN.OPTIMIZER[key] == KEYS[f"TRAIN.OPTIMIZER.{key}"].default for key in _OF_ADAMW_AND_SGD)
    ),
    "EPS and BETAS are AdamW's and MOMENTUM is SGD's; leave them out and give what it takes in TRAIN.OPTIMIZER.ARGS",
)
_OF_ADAMW_AND_SGD = ("EPS", "BETAS", "MOMENTUM")
_HAS_MILESTONES = Rule(
    lambda name, config: name != "multistep" or config.TRAIN.LR_SCHEDULER.MILESTONES,
    "needs TRAIN.LR_SCHEDULER.MILESTONES",
)
_RISING = Rule(
    lambda values, _: all(low < high for low, high in zip([0, *values], values)),
    "must be numbers greater than 0, each greater than the one before",
)
_MILESTONES_BEFORE_THE_END = Rule(
    lambda values, config: not values or values[-1] < (config.TRAIN.UPDATES or config.TRAIN.EPOCHS),
    "must be less than the run's length, TRAIN.UPDATES = {TRAIN.UPDATES}, or where that is 0 "
    "TRAIN.EPOCHS = {TRAIN.EPOCHS}",
)

# fmt: off
KEYS: dict[str, Key] = {
    "BASE": process([""], "YAML files that this one builds on; paths relative to it"),
    "TASK": network("classification", "what is trained: a folder of tasks/"),
    # ------------------------------------------------------------------------------------------------------------ data
    "DATA.BATCH_SIZE": process(128, "images per process (GPU) and step", at_least(1), flag="--batch-size"),
    "DATA.DATA_PATH": process(
        "", "folder with train/ and val/ (or train.zip, train_map.txt, val.zip, val_map.txt)", flag="--data-path"),
    "DATA.DATASET": network("imagenet", "names of the splits' folders", one_of(*SPLIT_NAMES)),
    "DATA.IMG_SIZE": network(
        224, "input height and width, pixels: one number, or [height, width]", between(32, 2**15), kind="size"),
    "DATA.ZIP_MODE": process(False, "read images from zip files instead of folders", flag="--zip"),
    "DATA.CACHE_MODE": process(
        "part", "zip files in memory: none, all in each process, or each process's share",
        one_of("no", "full", "part"), flag="--cache-mode"),
    "DATA.PIN_MEMORY": process(True, "page-locked batches, for faster copies to the GPU; nothing without a GPU"),
    "DATA.MAX_UNREADABLE": process(10, "unreadable training images a process may skip in a run", at_least(0)),
    "DATA.REPEATS": recipe(
        1, "augmented views of an image in one update; an epoch has as many updates, of fewer images", at_least(1),
        in_one_order(off=1)),
    "DATA.NUM_WORKERS": process(32, "loader processes per process, at most its share of the CPU cores", at_least(0)),
    # ----------------------------------------------------------------------------------------------------------- model
    "MODEL.TYPE": network(
        "groupmixformer", "the network family; there is one", one_of("groupmixformer"), flag="--model-type"),
    "MODEL.NAME": network(
        "groupmixformer", "names the run folder, <OUTPUT>/<MODEL.NAME>/<TAG>, and pretrained/<NAME>.pth", FILE_NAME),
    "MODEL.RESUME": process("", "checkpoint to continue from (train.py) or to evaluate", flag="--resume", kind="file"),
    "MODEL.PRETRAINED": process(
        "", "weights to start from (train.py) or to evaluate", flag="--pretrained", kind="file"),
    "MODEL.GMA.IN_DIM": network(3, "channels of the input: 3 (colour), or 1 (all pictures become grey)", _CHANNELS),
    "MODEL.GMA.NUM_STAGES": network(4, "stages; the lists of one value per stage have this length", at_least(1)),
    "MODEL.GMA.NUM_CLASSES": network(1000, "outputs; a run takes the number of classes of its data", between(1, 10**7)),
    "MODEL.GMA.EMBEDDING_DIMS": network([80, 160, 320, 320], "channels of each stage", between(1, 2**14), _PER_STAGE),
    "MODEL.GMA.SERIAL_DEPTHS": network([2, 4, 12, 4], "blocks of each stage", between(1, 1000), _PER_STAGE),
    "MODEL.GMA.NUM_HEADS": network(8, "attention heads in every block", between(1, 2**14)),
    "MODEL.GMA.GROUP_SIZES": network([3, 5, 7], "edges of the token groups, tokens", _ODD),
    "MODEL.GMA.LOCAL_BRANCH": network(True, "one segment of the channels is a local branch; False: all attend"),
    "MODEL.GMA.RELATIVE_POSITION": network(True, "convolutional relative position beside the attention"),
    "MODEL.GMA.MLP_RATIOS": network(
        [4, 4, 4, 4], "hidden width of the MLP / channels, of each stage", between(0.1, 100), _PER_STAGE,
        kind="numbers"),
    "MODEL.GMA.QKV_BIAS": network(True, "bias of the projection to q, k and v"),
    "MODEL.GMA.QKV_SCALE": network(
        None, "factor on the attended values; None: (channels / heads) ** -0.5", kind="number or None"),
    "MODEL.GMA.DROP_RATE": recipe(0.0, "dropout after the attention's projection and in the MLP", BELOW_ONE),
    "MODEL.GMA.ATTN_DROP_RATE": recipe(0.0, "dropout on the softmax of k", BELOW_ONE),
    "MODEL.GMA.DROP_PATH_RATE": recipe(
        0.2, "stochastic depth of the last block, rising linearly from 0 in the first", BELOW_ONE),
    # -------------------------------------------------------------------------------------------------------- training
    "TRAIN.EPOCHS": recipe(300, "epochs in all", at_least(1)),
    "TRAIN.UPDATES": recipe(0, "updates in all, the last epoch cut short; 0: EPOCHS decides", at_least(0)),
    "TRAIN.START_EPOCH": launch(0, "first epoch of a new run, counted from 0", at_least(0), _BEFORE_THE_END),
    "TRAIN.WARMUP_EPOCHS": recipe(20, "epochs of linear warm-up, part of EPOCHS", at_least(0), _WARMUP_ENDS,
                                  kind="number"),
    "TRAIN.WARMUP_UPDATES": recipe(
        0, "updates of linear warm-up; 0: WARMUP_EPOCHS decides", at_least(0), _UPDATE_BEFORE_THE_END),
    "TRAIN.WEIGHT_DECAY": recipe(0.05, "not applied to biases and one-dimensional parameters", at_least(0)),
    "TRAIN.RECIPE_BATCH": launch(
        1024, "images of an update in the recipe; a run with others gets a warning; 0: none", at_least(0)),
    "TRAIN.REFERENCE_BATCH": recipe(512, "images of an update that the next three are meant for", at_least(1)),
    "TRAIN.BASE_LR": recipe(
        5e-4, "learning rate; used, as the next two: x images of an update / REFERENCE_BATCH", POSITIVE,
        _ABOVE_MIN_LR, _ABOVE_WARMUP_LR),
    "TRAIN.WARMUP_LR": recipe(5e-7, "learning rate at update 0", at_least(0)),
    "TRAIN.MIN_LR": recipe(5e-6, "learning rate towards which 'cosine', 'linear' and 'poly' fall", at_least(0)),
    "TRAIN.LAYER_DECAY": recipe(
        1.0, "factor on the learning rate from each block to the one before it", between(0.01, 1)),
    "TRAIN.HEAD_LR_SCALE": recipe(1.0, "factor on the learning rate of the head", POSITIVE),
    "TRAIN.FREEZE": recipe(
        "", "frozen, running statistics included: 'backbone' for all but the head, n for the stem and n stages",
        _FROZEN_PART),
    "TRAIN.CLIP_GRAD": recipe(5.0, "largest L2 norm of all gradients together; 0: no clipping", at_least(0)),
    "TRAIN.AUTO_RESUME": process(True, "continue from the newest checkpoint of the run folder"),
    "TRAIN.ACCUMULATION_STEPS": launch(
        1, "batches whose gradients make one update", at_least(1), flag="--accumulation-steps"),
    "TRAIN.MAX_NONFINITE_UPDATES": launch(
        10, "updates in a row that may be skipped because loss or gradients are not finite", at_least(0)),
    "TRAIN.ALLOW_CHANGES": launch(
        False, "continue a run although its recipe or data changed since the checkpoint", flag="--allow-changes"),
    "TRAIN.USE_CHECKPOINT": process(
        False, "gradient checkpointing, less memory for more time: 'full' (or True) computes blocks twice, 'selective' "
        "all in them but matrix products and convolutions; by default nothing",
        one_of(False, True, "full", "selective"), _NOT_COMPILED, flag="--use-checkpoint", kind="switch"),
    "TRAIN.LR_SCHEDULER.NAME": recipe(
        "cosine", "schedule of the learning rate, by update",
        one_of("cosine", "linear", "poly", "step", "multistep"), _HAS_MILESTONES),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": recipe(30, "epochs between the steps of 'step'", at_least(1)),
    "TRAIN.LR_SCHEDULER.MILESTONES": recipe(
        [], "where 'multistep' falls: epochs done, or updates done where TRAIN.UPDATES decides", _RISING,
        _MILESTONES_BEFORE_THE_END, kind="numbers"),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": recipe(0.1, "factor of each step of 'step' and 'multistep'", POSITIVE),
    "TRAIN.LR_SCHEDULER.POWER": recipe(1.0, "exponent of 'poly'", POSITIVE),
    "TRAIN.OPTIMIZER.NAME": recipe(
        "adamw", "'adamw', 'sgd' with Nesterov momentum, or any other of timm's, such as 'lamb', 'lion', 'muon'",
        _OWN_ARGUMENTS),
    "TRAIN.OPTIMIZER.ARGS": recipe("", "further arguments of the optimizer, such as 'trust_clip=True, eps=1e-6'"),
    "TRAIN.OPTIMIZER.EPS": recipe(1e-8, "epsilon of AdamW", POSITIVE),
    "TRAIN.OPTIMIZER.BETAS": recipe((0.9, 0.999), "betas of AdamW", _BETAS),
    "TRAIN.OPTIMIZER.MOMENTUM": recipe(0.9, "momentum of SGD", BELOW_ONE),
    "TRAIN.VAL_FREQ": launch(1, "epochs between validations; the last epoch is always validated", at_least(1)),
    # ---------------------------------------------------------------------------- moving average of the weights (EMA)
    "EMA.ENABLED": recipe(True, "average weights and running statistics; validate the average beside the raw weights"),
    "EMA.DECAY": recipe(0.9999, "share of the old average at every update", BELOW_ONE),
    "EMA.WARMUP": recipe(False, "raise the decay from 0 to DECAY, for short runs: 1 - (1 + update) ** (-2/3)"),
    # ------------------------------------------------------------------------------------------------------ evaluation
    "TEST.FUSE": launch(False, "fuse the network for inference first: faster, equal up to rounding", flag="--fuse"),
    "TEST.WEIGHTS": launch(
        "best", "weights of a checkpoint to evaluate; best: those the checkpoint was kept for, else raw",
        one_of("best", "raw", "ema"), flag="--weights"),
    # ------------------------------------------------------------------------------------------------------------- run
    "COMPILE": recipe(
        False, "torch.compile: a minute at the start, faster steps; equal up to rounding", flag="--compile"),
    "COMPILE_MEMORY": recipe(
        0.5, "with COMPILE, share of a block's results that is kept for the backward pass; the rest is computed again",
        SHARE),
    "AMP_OPT_LEVEL": recipe(
        "", "O0: float32; O1, O2: autocast to AMP_DTYPE; default: O1 on a GPU, O0 on a CPU",
        one_of("", "O0", "O1", "O2"), flag="--amp-opt-level"),
    "AMP_DTYPE": recipe("bfloat16", "type of autocast; float16 has loss scaling", one_of("bfloat16", "float16")),
    "OUTPUT": process("", "root of the run folders, <OUTPUT>/<MODEL.NAME>/<TAG>; default: output", flag="--output"),
    "TAG": process("default", "name of the run", FILE_NAME, flag="--tag"),
    "SAVE_FREQ": process(1, "epochs between checkpoints", at_least(1)),
    "SAVE_KEEP": process(3, "newest checkpoints of whole epochs to keep beside the best one; 0: all", at_least(0)),
    "SAVE_EVERY_UPDATES": process(0, "updates between checkpoints within an epoch; 0: none", at_least(0)),
    "SAVE_EVERY_MINUTES": process(0.0, "minutes between checkpoints within an epoch; 0: none", at_least(0)),
    "LOG_SAMPLES": process(False, "write the images of every update to samples_rank<r>.txt in the run folder"),
    "LOG_WANDB": process("", "project of Weights & Biases that gets the numbers of the run; '': none; needs wandb"),
    "LOG_MLFLOW": process("", "experiment of MLflow that gets the numbers of the run; '': none; needs mlflow"),
    "PRINT_FREQ": process(10, "updates between log lines", at_least(1)),
    "SEED": recipe(0, "of initial weights (SEED + rank), order, augmentation, mixup and stochastic depth", _SEED),
    "DETERMINISTIC": process(False, "on GPUs, only kernels that give the same bits every time; slower"),
    "DIST_TIMEOUT_SECONDS": process(
        600, "seconds a process waits for the others before it gives up", between(1, 10**6)),
    "EVAL_MODE": process(False, "evaluate only", flag="--eval"),
    "THROUGHPUT_MODE": process(False, "measure images/s only", flag="--throughput"),
    "MODEL_FILE": process(
        "groupmixformer.py", "file of models/ that is copied to the run folder", FILE_NAME, flag="--model-file"),
}
# fmt: on
