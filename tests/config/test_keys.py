"""The cards of the configuration keys: released defaults, no key without a reader, no flag without a page."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

import tasks
from configs import UserError, read_config
from configs.arguments import OneLineParser, make_parser
from configs.keys import KEYS, RETIRED_KEYS, launch, network, process, recipe
from configs.load import flatten, to_dict
from utils.resume import recipe_changes

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "configs" / "groupmixformer_digits.yaml")
CARDS = {**KEYS, **tasks.keys_of("classification")}

# The keys of the release with their defaults: an interface, because users have YAML files of their own.
RELEASED = """
BASE: ['']
DATA: {BATCH_SIZE: 128, DATA_PATH: '', DATASET: imagenet, IMG_SIZE: 224, INTERPOLATION: bicubic, ZIP_MODE: false,
       CACHE_MODE: part, PIN_MEMORY: true, NUM_WORKERS: 32}
MODEL:
  {TYPE: groupmixformer, NAME: groupmixformer, RESUME: '', PRETRAINED: '', LABEL_SMOOTHING: 0.1,
   GMA: {IN_DIM: 3, NUM_STAGES: 4, NUM_CLASSES: 1000, EMBEDDING_DIMS: [80, 160, 320, 320], SERIAL_DEPTHS: [2, 4, 12, 4],
         NUM_HEADS: 8, MLP_RATIOS: [4, 4, 4, 4], QKV_BIAS: true, QKV_SCALE: null, DROP_RATE: 0.0, ATTN_DROP_RATE: 0.0,
         DROP_PATH_RATE: 0.2}}
TRAIN:
  {START_EPOCH: 0, EPOCHS: 300, WARMUP_EPOCHS: 20, WEIGHT_DECAY: 0.05, BASE_LR: 5.0e-4, WARMUP_LR: 5.0e-7,
   MIN_LR: 5.0e-6, CLIP_GRAD: 5.0, AUTO_RESUME: true, ACCUMULATION_STEPS: 1, USE_CHECKPOINT: false,
   LR_SCHEDULER: {NAME: cosine, DECAY_EPOCHS: 30, DECAY_RATE: 0.1},
   OPTIMIZER: {NAME: adamw, EPS: 1.0e-8, BETAS: [0.9, 0.999], MOMENTUM: 0.9}}
AUG: {COLOR_JITTER: 0.4, AUTO_AUGMENT: rand-m9-mstd0.5-inc1, REPROB: 0.25, REMODE: pixel, RECOUNT: 1, MIXUP: 0.8,
      CUTMIX: 1.0, CUTMIX_MINMAX: null, MIXUP_PROB: 1.0, MIXUP_SWITCH_PROB: 0.5, MIXUP_MODE: batch}
TEST: {CROP: true}
AMP_OPT_LEVEL: ''
OUTPUT: ''
TAG: default
SAVE_FREQ: 1
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: false
THROUGHPUT_MODE: false
MODEL_FILE: groupmixformer.py
"""

# Keys that nothing outside configs/ reads, and why they are no dead switches.
READ_BY_THE_CONFIGURATION_ITSELF = {
    "BASE": "names the files that are merged",
    "MODEL.TYPE": "there is one network family; another name is refused",
}

FLAGS = {
    "--batch-size": "DATA.BATCH_SIZE",
    "--data-path": "DATA.DATA_PATH",
    "--zip": "DATA.ZIP_MODE",
    "--cache-mode": "DATA.CACHE_MODE",
    "--pretrained": "MODEL.PRETRAINED",
    "--resume": "MODEL.RESUME",
    "--accumulation-steps": "TRAIN.ACCUMULATION_STEPS",
    "--use-checkpoint": "TRAIN.USE_CHECKPOINT",
    "--amp-opt-level": "AMP_OPT_LEVEL",
    "--output": "OUTPUT",
    "--tag": "TAG",
    "--eval": "EVAL_MODE",
    "--throughput": "THROUGHPUT_MODE",
    "--model-type": "MODEL.TYPE",
    "--model-file": "MODEL_FILE",
    # From here on not of the release.
    "--allow-changes": "TRAIN.ALLOW_CHANGES",
    "--compile": "COMPILE",
    "--fuse": "TEST.FUSE",
    "--weights": "TEST.WEIGHTS",
    "--tta": "TEST.TTA",
    "--sizes": "TEST.SIZES",
    "--val-set": "TEST.VAL_SET",
    "--class-names": "DATA.CLASS_NAMES",
}
FLAGS_WITHOUT_A_KEY = {"--cfg", "--opts", "--local_rank", "--local-rank", "--flops", "--images", "--out", "--json"}


@pytest.fixture
def empty(tmp_path: Path) -> str:
    """A YAML file without a key."""
    (tmp_path / "empty.yaml").touch()
    return str(tmp_path / "empty.yaml")


# --------------------------------------------------------------------------------------------------------------- cards
def test_released_defaults(empty, make_config):
    """Compared as text, which tells 1 from 1.0 and True."""
    defaults = dict(flatten(to_dict(make_config("--cfg", empty))))
    released = dict(flatten(yaml.safe_load(RELEASED)))
    assert {name: repr(defaults[name]) for name in released} == {name: repr(value) for name, value in released.items()}


def test_an_empty_file_gives_the_defaults(empty, make_config):
    config = make_config("--cfg", empty)
    assert dict(flatten(config)) == {name: key.default for name, key in CARDS.items()}
    assert config.is_frozen()
    assert config.MODEL.GMA.MLP_RATIOS is not CARDS["MODEL.GMA.MLP_RATIOS"].default, "a run must not reach the cards"


def test_every_card_is_filled_in(empty, make_config):
    config = make_config("--cfg", empty)
    for name, key in CARDS.items():
        assert len(key.meaning) > 7 and "%" not in key.meaning, f"{name}: argparse formats the meaning of flags"
        assert key.kind or key.default is not None, f"{name}: None does not show a type"
        for rule in key.rules:
            assert rule.accepts(key.default, config) and rule.demand and "\n" not in rule.demand, name
    assert not set(RETIRED_KEYS) & set(CARDS)


def test_what_a_value_belongs_to():
    cards = [make(0, "") for make in (network, recipe, launch, process)]
    assert [card.may_change_on_resume for card in cards] == [False, False, True, True]
    assert [card.same_on_all_ranks for card in cards] == [True, True, True, False]
    assert [card.kept_with_weights for card in cards] == [True, False, False, False]


def test_changes_of_a_run_are_told_by_its_cards(make_config):
    """A key that an older checkpoint does not have is no change, and neither is one that is not compared."""
    config = make_config("--opts", "SEED", "1", "TRAIN.OPTIMIZER.BETAS", "[0.9, 0.95]", "TAG", "new")
    older = yaml.safe_dump({"SEED": 0, "TAG": "old", "TRAIN": {"OPTIMIZER": {"BETAS": [0.9, 0.95]}}})
    fixed = {name for name, key in CARDS.items() if not key.may_change_on_resume}
    assert recipe_changes({"config": older}, config, {}, fixed) == ["SEED 0 -> 1"]


def keys_read(tree: ast.Module) -> set[str]:
    """Dotted configuration keys that a module reads, also through local names: `aug = config.AUG; aug.MIXUP`."""

    def constants(node: ast.expr, names: dict[str, list[str]]) -> list[str]:
        """['AUG', 'MIXUP'] for config.AUG.MIXUP, session.config.AUG.MIXUP and aug.MIXUP."""
        if isinstance(node, ast.Attribute):
            rest = constants(node.value, names)
            return [*rest, node.attr] if node.attr.isupper() else []
        return names.get(node.id, []) if isinstance(node, ast.Name) else []

    found = set()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        names: dict[str, list[str]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                target, value = node.targets[0], node.value
                pairs = [(target, value)]
                if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                    pairs = list(zip(target.elts, value.elts))
                for name, source in pairs:
                    if isinstance(name, ast.Name) and constants(source, names):
                        names[name.id] = constants(source, names)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(".".join(constants(node, names)))
    return found


def test_every_key_is_read_somewhere():
    files = [ROOT / "train.py", ROOT / "test.py"]
    files += [
        path for folder in ("data", "models", "tasks", "tools", "utils") for path in (ROOT / folder).rglob("*.py")
    ]
    read = set().union(*(keys_read(ast.parse(path.read_text(encoding="utf-8"))) for path in files))
    unread = set(CARDS) - read - set(READ_BY_THE_CONFIGURATION_ITSELF)
    assert not unread, "switches that switch nothing"
    assert not read & set(READ_BY_THE_CONFIGURATION_ITSELF), "no longer exempt"


def test_the_reading_test_can_fail():
    source = "def f(config):\n  aug, x = config.AUG, 1\n  config.TRAIN.EPOCHS = 3\n  return aug.MIXUP, config.SEED"
    read = keys_read(ast.parse(source))
    assert {"AUG.MIXUP", "SEED"} <= read and "TRAIN.EPOCHS" not in read and "AUG.CUTMIX" not in read


# --------------------------------------------------------------------------------------------------------------- flags
def test_no_new_flag_slips_in():
    assert {key.flag: name for name, key in CARDS.items() if key.flag} == FLAGS
    assert set(make_parser(CARDS, OneLineParser())._option_string_actions) == set(FLAGS) | FLAGS_WITHOUT_A_KEY | {
        "-h",
        "--help",
    }


def test_flag_sets_its_key_and_no_other(empty, make_config):
    before = dict(flatten(make_config("--cfg", empty)))
    for flag, name in FLAGS.items():
        names = [choice for rule in CARDS[name].rules for choice in rule.choices]
        value = {bool: True, int: 7, list: [64, 96], str: names[-1] if names else "x"}[type(before[name])]
        words = [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
        after = dict(flatten(make_config("--cfg", empty, flag, *words)))
        assert after == {**before, name: value}


def exit_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the parser prints before it exits with status 2: one line on standard error, nothing else."""
    with pytest.raises(SystemExit) as caught:
        read_config(words, tasks.keys_of)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch_size=4"], "unknown argument --batch_size; did you mean --batch-size?"),
        (["--outp", "x"], "unknown argument --outp; did you mean"),  # no guessing by abbreviation
        (["--epochs", "3"], "unknown argument --epochs; did you mean --opts TRAIN.EPOCHS VALUE?"),
        (["--lr", "3"], "did you mean --opts TRAIN.BASE_LR VALUE or --opts TRAIN.WARMUP_LR VALUE or --opts TR"),
        (["--workers", "3"], "did you mean --opts DATA.NUM_WORKERS VALUE?"),
        (["--gpus", "3"], "unknown argument --gpus; see --help"),  # not the nearest by letters, --opts
        (["--batch-size", "4", "stray"], "unknown argument stray"),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["--cache-mode", "all"], "--cache-mode: invalid choice: 'all'"),
        (["--opts"], "--opts: expected at least one argument"),
    ],
)
def test_wrong_flag(capsys, words, expected):
    assert expected in exit_line(capsys, "--cfg", DIGITS, *words)


def test_missing_cfg():
    with pytest.raises(UserError, match=r"^--cfg is missing: name the YAML file of the variant, --cfg configs/"):
        read_config(["--batch-size", "4"], tasks.keys_of)


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        read_config(["--nonsense"], tasks.keys_of)
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_flags_of_old_launchers_change_nothing(make_config):
    for words in (["--local_rank", "3"], ["--local-rank=3"]):
        assert to_dict(make_config(*words)) == to_dict(make_config())


def test_released_command(make_config, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = """--data-path imagenet --batch-size 64 --output /out --cfg ./configs/groupmixformer_small.yaml
        --model-type groupmixformer --model-file groupmixformer.py --tag groupmixformer_small"""
    config = make_config(*shlex.split(command))
    assert (config.DATA.BATCH_SIZE, config.TAG, config.OUTPUT) == (64, "groupmixformer_small", "/out")
    assert config.MODEL.GMA.EMBEDDING_DIMS == [80, 160, 320, 320]


def undocumented(flags: set[str], text: str) -> set[str]:
    return {flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)}


def test_every_flag_is_documented():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert not undocumented(set(FLAGS) | FLAGS_WITHOUT_A_KEY, text)


def test_the_documentation_test_can_fail():
    text = "`--batch-size N` and --zip-level; --local_rank."
    flags = {"--batch-size", "--zip", "--local_rank", "--size"}
    assert undocumented(flags, text) == {"--zip", "--size"}
