"""Configuration: released keys and defaults, where a value comes from, what is refused and in which words."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from configs import UserError, arguments, defaults, get_config, parse_args, with_num_classes
from configs.defaults import RETIRED_KEYS, config_keys, to_dict

ROOT = Path(__file__).resolve().parents[2]
YAML_FILES = sorted((ROOT / "configs").glob("*.yaml"))
DIGITS = str(ROOT / "configs" / "groupmixformer_digits.yaml")

RELEASED_DEFAULTS = {
    "BASE": [""],
    "DATA.BATCH_SIZE": 128,
    "DATA.DATA_PATH": "",
    "DATA.DATASET": "imagenet",
    "DATA.IMG_SIZE": 224,
    "DATA.INTERPOLATION": "bicubic",
    "DATA.ZIP_MODE": False,
    "DATA.CACHE_MODE": "part",
    "DATA.PIN_MEMORY": True,
    "DATA.NUM_WORKERS": 32,
    "MODEL.TYPE": "groupmixformer",
    "MODEL.NAME": "groupmixformer",
    "MODEL.RESUME": "",
    "MODEL.PRETRAINED": "",
    "MODEL.LABEL_SMOOTHING": 0.1,
    "MODEL.GMA.IN_DIM": 3,
    "MODEL.GMA.NUM_STAGES": 4,
    "MODEL.GMA.NUM_CLASSES": 1000,
    "MODEL.GMA.EMBEDDING_DIMS": [80, 160, 320, 320],
    "MODEL.GMA.SERIAL_DEPTHS": [2, 4, 12, 4],
    "MODEL.GMA.NUM_HEADS": 8,
    "MODEL.GMA.MLP_RATIOS": [4, 4, 4, 4],
    "MODEL.GMA.QKV_BIAS": True,
    "MODEL.GMA.QKV_SCALE": None,
    "MODEL.GMA.DROP_RATE": 0.0,
    "MODEL.GMA.ATTN_DROP_RATE": 0.0,
    "MODEL.GMA.DROP_PATH_RATE": 0.2,
    "TRAIN.START_EPOCH": 0,
    "TRAIN.EPOCHS": 300,
    "TRAIN.WARMUP_EPOCHS": 20,
    "TRAIN.WEIGHT_DECAY": 0.05,
    "TRAIN.BASE_LR": 5e-4,
    "TRAIN.WARMUP_LR": 5e-7,
    "TRAIN.MIN_LR": 5e-6,
    "TRAIN.CLIP_GRAD": 5.0,
    "TRAIN.AUTO_RESUME": True,
    "TRAIN.ACCUMULATION_STEPS": 1,
    "TRAIN.USE_CHECKPOINT": False,
    "TRAIN.LR_SCHEDULER.NAME": "cosine",
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 30,
    "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.1,
    "TRAIN.OPTIMIZER.NAME": "adamw",
    "TRAIN.OPTIMIZER.EPS": 1e-8,
    "TRAIN.OPTIMIZER.BETAS": (0.9, 0.999),
    "TRAIN.OPTIMIZER.MOMENTUM": 0.9,
    "AUG.COLOR_JITTER": 0.4,
    "AUG.AUTO_AUGMENT": "rand-m9-mstd0.5-inc1",
    "AUG.REPROB": 0.25,
    "AUG.REMODE": "pixel",
    "AUG.RECOUNT": 1,
    "AUG.MIXUP": 0.8,
    "AUG.CUTMIX": 1.0,
    "AUG.CUTMIX_MINMAX": None,
    "AUG.MIXUP_PROB": 1.0,
    "AUG.MIXUP_SWITCH_PROB": 0.5,
    "AUG.MIXUP_MODE": "batch",
    "TEST.CROP": True,
    "AMP_OPT_LEVEL": "",
    "OUTPUT": "",
    "TAG": "default",
    "SAVE_FREQ": 1,
    "PRINT_FREQ": 10,
    "SEED": 0,
    "EVAL_MODE": False,
    "THROUGHPUT_MODE": False,
    "MODEL_FILE": "groupmixformer.py",
}
RELEASED_BUT_RETIRED = {"MODEL.GMA.PATCH_SIZE": 4, "MODEL.GMA.PRETRAINED": False, "LOCAL_RANK": 0}

# Keys that nothing outside configs/ reads, and why they are no dead switches. `test_exempt_keys_decide_something`.
READ_BY_THE_CONFIGURATION_ITSELF = {
    "BASE": "names the files that are merged",
    "MODEL.TYPE": "there is one network family; another name is refused",
    "MODEL.GMA.NUM_STAGES": "the lists of MODEL.GMA must have this length",
}

FLAGS = {
    "-h", "--help", "--cfg", "--opts", "--batch-size", "--data-path", "--zip", "--cache-mode", "--pretrained",
    "--resume", "--accumulation-steps", "--use-checkpoint", "--amp-opt-level", "--output", "--tag", "--eval",
    "--throughput", "--local_rank", "--local-rank", "--model-type", "--model-file",
    "--weights", "--flops", "--allow-changes", "--tta", "--sizes", "--val-set", "--images", "--json",  # ours
    "--compile", "--fuse",
}  # fmt: skip


def write_yaml(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(*arguments_: str) -> str:
    """The message of the UserError that this command line ends in; it must be one line."""
    with pytest.raises(UserError) as caught:
        get_config(parse_args(list(arguments_)), notify=lambda line: None)
    message = str(caught.value)
    assert "\n" not in message
    return message


def option_strings(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.setattr(arguments.OneLineParser, "parse_args", lambda self, *_: self)
    return set(parse_args([])._option_string_actions)


# ------------------------------------------------------------------------------------------------------ keys, defaults
@pytest.mark.parametrize("key", RELEASED_DEFAULTS)
def test_released_default(key):
    value = dict(config_keys())[key]
    assert value == RELEASED_DEFAULTS[key]
    assert type(value) is type(RELEASED_DEFAULTS[key])


def test_empty_file_gives_the_defaults(tmp_path, make_config):
    config = make_config("--cfg", write_yaml(tmp_path, ""))
    assert to_dict(config) == to_dict(defaults._C)
    assert config.is_frozen()
    assert to_dict(make_config()) != to_dict(defaults._C)
    assert defaults._C.DATA.IMG_SIZE == 224, "a run's values must not reach the defaults"


@pytest.mark.parametrize("key", RELEASED_BUT_RETIRED)
@pytest.mark.parametrize("through", ["file", "nested file", "--opts"])
def test_retired_key_is_accepted_with_one_notice_and_no_effect(tmp_path, key, through):
    value = RELEASED_BUT_RETIRED[key]
    text = ""
    if through == "file":
        text = f"{key}: {value}\n"
    elif through == "nested file":
        nested = value
        for name in reversed(key.split(".")):
            nested = {name: nested}
        text = yaml.safe_dump(nested)
    opts = ["--opts", key, str(value)] if through == "--opts" else []
    notices = []
    config = get_config(parse_args(["--cfg", write_yaml(tmp_path, text), *opts]), notices.append)
    assert len(notices) == 1 and key in notices[0] and "ignored" in notices[0] and "\n" not in notices[0]
    assert to_dict(config) == to_dict(defaults._C)


def test_a_cache_mode_without_zip_files_is_told(tmp_path):
    path = write_yaml(tmp_path, "")
    for flags, told in ((["--cache-mode", "full"], 1), (["--cache-mode", "full", "--zip"], 0), ([], 0)):
        notices = []
        get_config(parse_args(["--cfg", path, *flags]), notices.append)
        assert len(notices) == told and all("--cache-mode has no effect without --zip" in line for line in notices)


def test_retired_and_known_keys_are_different():
    assert set(RETIRED_KEYS) == set(RELEASED_BUT_RETIRED)
    assert not set(RETIRED_KEYS) & set(dict(config_keys()))


def test_every_key_is_documented_where_it_is_defined():
    lines = (ROOT / "configs" / "defaults.py").read_text(encoding="utf-8").splitlines()
    definitions = {match[1]: line for line in lines if (match := re.match(r"_C\.([A-Z_.0-9]+) = (?!CfgNode)", line))}
    assert set(definitions) == set(dict(config_keys()))
    without = [key for key, line in definitions.items() if not re.search(r"  # \S.{7,}", line)]
    assert not without


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
    unread = set(dict(config_keys())) - read - set(READ_BY_THE_CONFIGURATION_ITSELF)
    assert not unread, "switches that switch nothing"
    assert not read & set(READ_BY_THE_CONFIGURATION_ITSELF), "no longer exempt"


def test_the_reading_test_can_fail():
    source = "def f(config):\n  aug, x = config.AUG, 1\n  config.TRAIN.EPOCHS = 3\n  return aug.MIXUP, config.SEED"
    read = keys_read(ast.parse(source))
    assert {"AUG.MIXUP", "SEED"} <= read and "TRAIN.EPOCHS" not in read and "AUG.CUTMIX" not in read


def test_exempt_keys_decide_something(tmp_path):
    cfg = write_yaml(tmp_path, "")
    assert "swin" in error_of("--cfg", cfg, "--model-type", "swin")
    assert "NUM_STAGES = 3" in error_of("--cfg", cfg, "--opts", "MODEL.GMA.NUM_STAGES", "3")


# ---------------------------------------------------------------------------------------------------------- precedence
def test_later_sources_win(tmp_path, make_config):
    write_yaml(tmp_path, "TRAIN: {EPOCHS: 100, WARMUP_EPOCHS: 11, CLIP_GRAD: 1.0, ACCUMULATION_STEPS: 2}", "base.yaml")
    text = "BASE: base.yaml\nTRAIN: {WARMUP_EPOCHS: 12, CLIP_GRAD: 2.0, ACCUMULATION_STEPS: 3}"
    opts = ["TRAIN.CLIP_GRAD", "3", "TRAIN.ACCUMULATION_STEPS", "4"]
    config = make_config("--cfg", write_yaml(tmp_path, text), "--opts", *opts, "--accumulation-steps", "5")
    train = config.TRAIN
    assert train.WEIGHT_DECAY == 0.05, "default"
    assert train.EPOCHS == 100, "BASE before the default"
    assert train.WARMUP_EPOCHS == 12, "the file before BASE"
    assert train.CLIP_GRAD == 3.0, "--opts before the file"
    assert train.ACCUMULATION_STEPS == 5, "a flag before --opts"


def test_flags_win_wherever_they_stand(tmp_path, make_config):
    cfg = write_yaml(tmp_path, "TAG: file")
    for order in (["--tag", "flag", "--opts", "TAG", "opts"], ["--opts", "TAG", "opts", "--tag", "flag"]):
        assert make_config("--cfg", cfg, *order).TAG == "flag"


def test_repeated_opts_add_up(tmp_path, make_config):
    cfg = write_yaml(tmp_path, "")
    first, second = ["TRAIN.EPOCHS", "50", "SAVE_FREQ", "2"], ["SEED", "3", "TRAIN.EPOCHS", "60"]
    config = make_config("--cfg", cfg, "--opts", *first, "--opts", *second)
    assert (config.SAVE_FREQ, config.SEED, config.TRAIN.EPOCHS) == (2, 3, 60)
    assert make_config("--cfg", cfg).TRAIN.EPOCHS == 300, "one command line must not reach the next"


@pytest.mark.parametrize("bases", ["b.yaml", "[b.yaml]", "['', b.yaml]"])
def test_base_chain(tmp_path, make_config, bases):
    write_yaml(tmp_path, "SEED: 1\nTAG: a\nSAVE_FREQ: 7", "a.yaml")
    write_yaml(tmp_path, "BASE: a.yaml\nSEED: 2\nTAG: b", "b.yaml")
    config = make_config("--cfg", write_yaml(tmp_path, f"BASE: {bases}\nSEED: 3"))
    assert (config.SEED, config.TAG, config.SAVE_FREQ) == (3, "b", 7)


def test_base_list_is_merged_in_its_order(tmp_path, make_config):
    write_yaml(tmp_path, "SEED: 1\nTAG: first", "1.yaml")
    write_yaml(tmp_path, "SEED: 2", "2.yaml")
    config = make_config("--cfg", write_yaml(tmp_path, "BASE: [1.yaml, 2.yaml]"))
    assert (config.SEED, config.TAG) == (2, "first")
    # One file twice, on two branches, is no cycle.
    write_yaml(tmp_path, "BASE: 1.yaml", "3.yaml")
    assert make_config("--cfg", write_yaml(tmp_path, "BASE: [1.yaml, 3.yaml]")).SEED == 1


def test_base_is_relative_to_the_file_that_names_it(tmp_path, make_config, monkeypatch):
    (tmp_path / "common").mkdir()
    (tmp_path / "mine").mkdir()
    write_yaml(tmp_path / "common", "BASE: ['deeper.yaml']\nSEED: 5", "base.yaml")
    write_yaml(tmp_path / "common", "TAG: deeper", "deeper.yaml")
    cfg = write_yaml(tmp_path / "mine", "BASE: ['../common/base.yaml']")
    monkeypatch.chdir(tmp_path / "mine")
    for path in (cfg, "run.yaml"):
        config = make_config("--cfg", path)
        assert (config.SEED, config.TAG) == (5, "deeper")


def test_base_cycle(tmp_path):
    write_yaml(tmp_path, "BASE: b.yaml", "a.yaml")
    write_yaml(tmp_path, "BASE: a.yaml", "b.yaml")
    assert "BASE leads back" in error_of("--cfg", str(tmp_path / "a.yaml"))
    assert "BASE leads back" in error_of("--cfg", write_yaml(tmp_path, "BASE: run.yaml"))


@pytest.mark.parametrize("base", ["5", "true", "{a: b}", "[1]", "[[run.yaml]]"])
def test_base_of_a_wrong_type(tmp_path, base):
    message = error_of("--cfg", write_yaml(tmp_path, f"BASE: {base}"))
    assert "BASE = " in message and "run.yaml" in message


def test_base_belongs_into_a_file(tmp_path):
    cfg = write_yaml(tmp_path, "")
    for value in ("x.yaml", "['x.yaml']"):
        assert "BASE" in error_of("--cfg", cfg, "--opts", "BASE", value)


def test_missing_base_is_named(tmp_path):
    write_yaml(tmp_path, "", "common.yaml")
    message = error_of("--cfg", write_yaml(tmp_path, "BASE: comon.yaml"))
    assert "comon.yaml" in message and "did you mean" in message and message.endswith("common.yaml?")


# --------------------------------------------------------------------------------------------------------------- types
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.BASE_LR", "5e-4", 5e-4),  # YAML 1.1 takes a float without a dot for text
        ("TRAIN.BASE_LR", "1E-3", 1e-3),
        ("TRAIN.CLIP_GRAD", "5", 5.0),
        ("TRAIN.CLIP_GRAD", "'5.5'", 5.5),
        ("TRAIN.EPOCHS", "'100'", 100),
        ("TRAIN.AUTO_RESUME", "false", False),
        ("TRAIN.AUTO_RESUME", "'False'", False),
        ("TRAIN.USE_CHECKPOINT", "'true'", True),
        ("AUG.CUTMIX_MINMAX", "None", None),
        ("AUG.CUTMIX_MINMAX", "null", None),
        ("AUG.CUTMIX_MINMAX", "[0.2, 0.8]", [0.2, 0.8]),
        ("AUG.CUTMIX_MINMAX", "'(0.2, 0.8)'", [0.2, 0.8]),
        ("MODEL.GMA.QKV_SCALE", "None", None),
        ("MODEL.GMA.QKV_SCALE", "0.125", 0.125),
        ("MODEL.GMA.QKV_SCALE", "2", 2),
        ("TRAIN.OPTIMIZER.BETAS", "[0.9, 0.95]", (0.9, 0.95)),
        ("TRAIN.OPTIMIZER.BETAS", "'(0.9, 0.95)'", (0.9, 0.95)),
        ("MODEL.GMA.EMBEDDING_DIMS", "[40, 80, 160, 160]", [40, 80, 160, 160]),
        ("MODEL.GMA.MLP_RATIOS", "[4, 3.5, 4, 2]", [4, 3.5, 4, 2]),
        ("TAG", "2024", "2024"),
        ("TAG", "'None'", "None"),
    ],
)
@pytest.mark.parametrize("through", ["file", "--opts"])
def test_value_takes_the_type_of_the_default(tmp_path, make_config, key, text, value, through):
    if through == "file":
        config = make_config("--cfg", write_yaml(tmp_path, f"{key}: {text}"))
    else:
        config = make_config("--cfg", write_yaml(tmp_path, ""), "--opts", key, text.strip("'"))
    result = dict(config_keys(config))[key]
    assert result == value and type(result) is type(value)


def test_null_is_empty_text(tmp_path, make_config):
    assert make_config("--cfg", write_yaml(tmp_path, "OUTPUT: null")).OUTPUT == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.BATCH_SIZE", "64.0"),
        ("DATA.BATCH_SIZE", "true"),
        ("DATA.BATCH_SIZE", "many"),
        ("DATA.BATCH_SIZE", "null"),
        ("DATA.ZIP_MODE", "1"),
        ("DATA.ZIP_MODE", "maybe"),
        ("TRAIN.BASE_LR", "fast"),
        ("TRAIN.BASE_LR", ".nan"),
        ("TRAIN.BASE_LR", ".inf"),
        ("TRAIN.BASE_LR", "1e999"),
        ("TRAIN.BASE_LR", "9" * 400),
        ("TRAIN.BASE_LR", "true"),
        ("TRAIN.CLIP_GRAD", "null"),
        ("TRAIN.OPTIMIZER.BETAS", "0.9"),
        ("TRAIN.OPTIMIZER.BETAS", "[a, b]"),
        ("MODEL.GMA.EMBEDDING_DIMS", "[80, 160, 320, 320.5]"),
        ("MODEL.GMA.EMBEDDING_DIMS", "[true, 160, 320, 320]"),
        ("MODEL.GMA.EMBEDDING_DIMS", "80"),
        ("AUG.CUTMIX_MINMAX", "0.5"),
        ("TAG", "[a]"),
        ("MODEL", "5"),
        ("TRAIN", "null"),
    ],
)
def test_wrong_type_is_told_with_key_and_value(tmp_path, key, value):
    message = error_of("--cfg", write_yaml(tmp_path, f"{key}: {value}"))
    assert re.search(rf"\b{re.escape(key)} = ", message)
    shown = message.partition(" = ")[2]
    assert shown.startswith(repr(yaml.safe_load(value))) and ": " in shown


# -------------------------------------------------------------------------------------------------- unknown, impossible
@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("DATA.BACH_SIZE", "DATA.BATCH_SIZE"),
        ("TRAIN.EPOCH", "TRAIN.EPOCHS"),
        ("train.epochs", "TRAIN.EPOCHS"),
        ("TRAIN.LR_SCHEDULER.NAMES", "TRAIN.LR_SCHEDULER.NAME"),
        ("SAVEFREQ", "SAVE_FREQ"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_one(tmp_path, key, suggestion):
    cfg = write_yaml(tmp_path, "")
    for message in (
        error_of("--cfg", cfg, "--opts", key, "3"),
        error_of("--cfg", write_yaml(tmp_path, f"{key}: 3", "other.yaml")),
    ):
        assert f"unknown key {key}; did you mean {suggestion}?" in message
    assert "unknown key QQQQ" in error_of("--cfg", cfg, "--opts", "QQQQ", "3")
    assert "other.yaml" in message, "says where the key stands"


def exit_line(capsys: pytest.CaptureFixture[str], *arguments_: str) -> str:
    """What the parser prints before it exits with status 2: one line on standard error, nothing else."""
    with pytest.raises(SystemExit) as caught:
        parse_args(list(arguments_))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batchsize", "4"], "unknown argument --batchsize; did you mean --batch-size?"),
        (["--batch_size=4"], "unknown argument --batch_size; did you mean --batch-size?"),
        (["--data_path", "x"], "unknown argument --data_path; did you mean --data-path?"),
        (["--out", "x"], "unknown argument --out; did you mean"),  # no guessing by abbreviation
        (["stray"], "unknown argument stray"),
        (["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["--cache-mode", "all"], "--cache-mode: invalid choice: 'all'"),
        (["--amp-opt-level", "O3"], "--amp-opt-level: invalid choice: 'O3'"),
        (["--opts"], "--opts: expected at least one argument"),
    ],
)
def test_wrong_flag(capsys, words, expected):
    assert expected in exit_line(capsys, "--cfg", DIGITS, *words)


def test_missing_cfg(capsys):
    assert "--cfg" in exit_line(capsys, "--batch-size", "4")


def test_only_the_first_process_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as caught:
        parse_args(["--nonsense"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


IMPOSSIBLE = [
    ("DATA.BATCH_SIZE", "0"),
    ("DATA.BATCH_SIZE", "-8"),
    ("DATA.DATASET", "imagenette"),
    ("DATA.IMG_SIZE", "31"),
    ("DATA.INTERPOLATION", "cubic"),
    ("DATA.CACHE_MODE", "all"),
    ("DATA.FAST_LOADING", "yes"),
    ("DATA.NUM_WORKERS", "-1"),
    ("TRAIN.LAYER_DECAY", "0"),
    ("TRAIN.LAYER_DECAY", "1.1"),
    ("TRAIN.HEAD_LR_SCALE", "0"),
    ("MODEL.TYPE", "swin"),
    ("MODEL.NAME", "a/b"),
    ("MODEL.NAME", ".."),
    ("MODEL.LABEL_SMOOTHING", "1.0"),
    ("MODEL.LABEL_SMOOTHING", "-0.1"),
    ("MODEL.GMA.IN_DIM", "0"),
    ("MODEL.GMA.NUM_CLASSES", "0"),
    ("MODEL.GMA.NUM_HEADS", "0"),
    ("MODEL.GMA.GROUP_SIZES", "[3, 4]"),
    ("MODEL.GMA.EMBEDDING_DIMS", "[]"),
    ("MODEL.GMA.EMBEDDING_DIMS", "[80, 160, 320]"),
    ("MODEL.GMA.EMBEDDING_DIMS", "[80, 160, 0, 320]"),
    ("MODEL.GMA.SERIAL_DEPTHS", "[2, 4, 12, 4, 4]"),
    ("MODEL.GMA.MLP_RATIOS", "[4, 4, 4, -4]"),
    ("MODEL.GMA.DROP_PATH_RATE", "1.0"),
    ("MODEL.GMA.DROP_RATE", "-0.1"),
    ("MODEL.GMA.ATTN_DROP_RATE", "1.5"),
    ("TRAIN.EPOCHS", "0"),
    ("TRAIN.WARMUP_EPOCHS", "-1"),
    ("TRAIN.WARMUP_EPOCHS", "300"),
    ("TRAIN.START_EPOCH", "300"),
    ("TRAIN.WEIGHT_DECAY", "-0.05"),
    ("TRAIN.BASE_LR", "0.0"),
    ("TRAIN.BASE_LR", "-0.0005"),
    ("TRAIN.BASE_LR", "-5e-4"),  # argparse alone would take it for a flag
    ("TRAIN.WARMUP_LR", "-1e-3"),
    ("TRAIN.MIN_LR", "-1.0"),
    ("TRAIN.CLIP_GRAD", "-1.0"),
    ("TRAIN.ACCUMULATION_STEPS", "0"),
    ("TRAIN.LR_SCHEDULER.NAME", "cos"),
    ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "0"),
    ("TRAIN.LR_SCHEDULER.DECAY_RATE", "0.0"),
    ("TRAIN.OPTIMIZER.NAME", "adam"),
    ("TRAIN.OPTIMIZER.EPS", "0.0"),
    ("TRAIN.OPTIMIZER.BETAS", "(0.9, 1.0)"),
    ("TRAIN.OPTIMIZER.BETAS", "(0.9,)"),
    ("TRAIN.OPTIMIZER.MOMENTUM", "1.0"),
    ("EMA.DECAY", "1.0"),
    ("AUG.COLOR_JITTER", "-0.4"),
    ("AUG.HFLIP", "1.5"),
    ("AUG.REPROB", "2.0"),
    ("AUG.REMODE", "noise"),
    ("AUG.RECOUNT", "0"),
    ("AUG.MIXUP", "-0.8"),
    ("AUG.CUTMIX", "-1.0"),
    ("AUG.CUTMIX_MINMAX", "[0.8, 0.2]"),
    ("AUG.MIXUP_PROB", "1.1"),
    ("AUG.MIXUP_SWITCH_PROB", "-0.5"),
    ("AUG.MIXUP_MODE", "half"),
    ("TEST.WEIGHTS", "swa"),
    ("TEST.TTA", "hflip"),
    ("TEST.SIZES", "[224, 16]"),
    ("TEST.VAL_SET", "sketch"),
    ("TEST.PREDICTIONS", "xlsx"),
    ("AMP_OPT_LEVEL", "O3"),
    ("AMP_DTYPE", "float8"),
    ("TAG", "a/b"),
    ("TAG", ""),
    ("SAVE_FREQ", "0"),
    ("SAVE_KEEP", "-1"),
    ("PRINT_FREQ", "0"),
    ("SEED", "-1"),
    ("SEED", str(2**63)),  # torch could not take it
    ("DIST_TIMEOUT_SECONDS", "0"),
    ("MODEL_FILE", "../train.py"),
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_impossible_value_is_told_with_key_and_value(tmp_path, key, value):
    message = error_of("--cfg", write_yaml(tmp_path, ""), "--opts", key, value)
    assert f"{key} = " in message
    shown = {value, repr(value)} | ({str(float(value))} if re.fullmatch(r"-?[\d.]+e-?\d+", value) else set())
    assert any(f"{key} = {form}" in message for form in shown), message


def test_every_rule_has_a_case():
    """A rule that nobody tries may refuse everything, or nothing."""
    untried = set(defaults._RULES) - {key for key, _ in IMPOSSIBLE}
    assert untried <= {"MODEL.GMA.NUM_STAGES"} | {
        key for key in defaults._RULES if defaults._RULES[key][1] in ("must be at least 0", "must be at least 1")
    }


def test_every_rule_accepts_the_default_and_names_a_key():
    values = dict(config_keys())
    for key, (accepts, requirement) in defaults._RULES.items():
        assert accepts(values[key]), key
        assert requirement and "\n" not in requirement


def test_opts_need_pairs(tmp_path):
    message = error_of("--cfg", write_yaml(tmp_path, ""), "--opts", "TRAIN.EPOCHS")
    assert "--opts" in message and "TRAIN.EPOCHS" in message


def test_value_of_a_flag_is_checked(tmp_path):
    assert "DATA.BATCH_SIZE = 0" in error_of("--cfg", write_yaml(tmp_path, ""), "--batch-size", "0")
    message = error_of("--cfg", write_yaml(tmp_path, ""), "--accumulation-steps", "-1")
    assert "TRAIN.ACCUMULATION_STEPS = -1" in message


# ---------------------------------------------------------------------------------------------------------- YAML files
@pytest.mark.parametrize(
    "text",
    [
        "TRAIN: [",
        "TRAIN:\n\tEPOCHS: 3",
        "a: b: c",
        "- 1\n- 2",
        "just text",
        "---\nSEED: 1\n---\nSEED: 2",
        "SEED: !unknown 3",
        "? [a, b]\n: 3",
        "MODEL: &m {GMA: *m}",
        "TRAIN: {EPOCHS: 50}\nTRAIN: {BASE_LR: 1.0}",
        "SEED: 1\nSEED: 2",
        "TRAIN:\n  EPOCHS: 50\n  EPOCHS: 60",
    ],
)
def test_broken_yaml_is_one_line_that_names_the_file(tmp_path, text):
    message = error_of("--cfg", write_yaml(tmp_path, text))
    assert message.startswith(str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x00", bytes(range(256))])
def test_binary_file_is_refused(tmp_path, content):
    (tmp_path / "run.yaml").write_bytes(content)
    assert "run.yaml" in error_of("--cfg", str(tmp_path / "run.yaml"))


def test_missing_and_unreadable_file(tmp_path):
    near = f"no such configuration file; did you mean {ROOT}/configs/groupmixformer_small.yaml?"
    assert near in error_of("--cfg", f"{ROOT}/configs/groupmixformer_smal.yaml")
    assert str(tmp_path / "no.yaml") in error_of("--cfg", str(tmp_path / "no.yaml"))
    assert str(tmp_path) in error_of("--cfg", str(tmp_path))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]",
        "!!python/object/new:os.system ['touch {}']",
        "!!python/name:os.system",
    ],
)
def test_yaml_tags_run_nothing(tmp_path, tag):
    proof = tmp_path / "proof"
    message = error_of("--cfg", write_yaml(tmp_path, "TAG: " + tag.format(proof)))
    assert "python" in message
    assert not proof.exists()


def test_merge_keys_and_anchors_work(tmp_path, make_config):
    text = "TRAIN:\n  <<: &common {EPOCHS: 50, WARMUP_EPOCHS: 5}\n  WARMUP_EPOCHS: 6\n"
    train = make_config("--cfg", write_yaml(tmp_path, text)).TRAIN
    assert (train.EPOCHS, train.WARMUP_EPOCHS) == (50, 6)


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.stem)
def test_yaml_of_the_repository_loads_without_a_notice(path):
    notices = []
    config = get_config(parse_args(["--cfg", str(path)]), notices.append)
    assert not notices
    assert path.stem == config.MODEL.NAME


def test_variants_do_not_share_a_run_folder():
    names = [get_config(parse_args(["--cfg", str(path)]), print).MODEL.NAME for path in YAML_FILES]
    assert len(set(names)) == len(names) >= 6
    assert defaults._C.MODEL.NAME not in names


def test_config_json_round_trip(tmp_path, make_config):
    from utils.session import describe_run

    opts = ["TRAIN.WARMUP_LR", "5e-7", "AUG.CUTMIX_MINMAX", "[0.2,0.8]", "TRAIN.OPTIMIZER.BETAS", "(0.9,0.95)"]
    config = make_config("--tag", "très long", "--data-path", "1e3", "--zip", "--opts", *opts)
    describe_run(config, tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    again = make_config("--cfg", str(tmp_path / "config.json"))
    assert to_dict(again) == to_dict(config)
    assert again.TRAIN.OPTIMIZER.BETAS == (0.9, 0.95)
    assert again.DATA.DATA_PATH == "1e3"


def test_with_num_classes_leaves_the_configuration_alone(make_config):
    config = make_config()
    other = with_num_classes(config, 7)
    assert (config.MODEL.GMA.NUM_CLASSES, other.MODEL.GMA.NUM_CLASSES) == (1000, 7)
    assert config.is_frozen() and other.is_frozen()


# --------------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--batch-size", "64"], "DATA.BATCH_SIZE", 64),
        (["--data-path", "/data"], "DATA.DATA_PATH", "/data"),
        (["--zip"], "DATA.ZIP_MODE", True),
        (["--cache-mode", "no"], "DATA.CACHE_MODE", "no"),
        (["--cache-mode", "full"], "DATA.CACHE_MODE", "full"),
        (["--cache-mode", "part"], "DATA.CACHE_MODE", "part"),
        (["--pretrained", "w.pth"], "MODEL.PRETRAINED", "w.pth"),
        (["--resume", "c.pth"], "MODEL.RESUME", "c.pth"),
        (["--accumulation-steps", "4"], "TRAIN.ACCUMULATION_STEPS", 4),
        (["--use-checkpoint"], "TRAIN.USE_CHECKPOINT", True),
        (["--amp-opt-level", "O0"], "AMP_OPT_LEVEL", "O0"),
        (["--amp-opt-level", "O1"], "AMP_OPT_LEVEL", "O1"),
        (["--amp-opt-level", "O2"], "AMP_OPT_LEVEL", "O2"),
        (["--output", "out"], "OUTPUT", "out"),
        (["--tag", "mine"], "TAG", "mine"),
        (["--eval"], "EVAL_MODE", True),
        (["--throughput"], "THROUGHPUT_MODE", True),
        (["--model-type", "groupmixformer"], "MODEL.TYPE", "groupmixformer"),
        (["--model-file", "build.py"], "MODEL_FILE", "build.py"),
        (["--weights", "ema"], "TEST.WEIGHTS", "ema"),
        (["--compile"], "COMPILE", True),
        (["--fuse"], "TEST.FUSE", True),
        (["--tta", "flip"], "TEST.TTA", "flip"),
        (["--sizes", "224", "256"], "TEST.SIZES", [224, 256]),
        (["--val-set", "v2"], "TEST.VAL_SET", "v2"),
    ],
)
def test_flag_sets_its_key_and_no_other(make_config, words, key, value):
    before, after = dict(config_keys(make_config())), dict(config_keys(make_config(*words)))
    assert after[key] == value
    assert {k for k in after if after[k] != before[k]} <= {key}


@pytest.mark.parametrize("words", [["--local_rank", "3"], ["--local-rank=3"], ["--local_rank=3"], []])
def test_flags_of_old_launchers_change_nothing(make_config, words):
    assert to_dict(make_config(*words)) == to_dict(make_config())


def test_switched_off_in_a_file_stays_off_without_the_flag(tmp_path, make_config):
    """A flag that is not given must not bring back its default over what the file says."""
    text = "DATA: {ZIP_MODE: True, BATCH_SIZE: 6}\nTRAIN: {USE_CHECKPOINT: True}\nAMP_OPT_LEVEL: O0\nEVAL_MODE: True"
    config = make_config("--cfg", write_yaml(tmp_path, text))
    assert config.DATA.ZIP_MODE and config.TRAIN.USE_CHECKPOINT and config.EVAL_MODE
    assert (config.DATA.BATCH_SIZE, config.AMP_OPT_LEVEL) == (6, "O0")


def test_released_command(make_config, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = """--data-path imagenet --batch-size 64 --output /out --cfg ./configs/groupmixformer_small.yaml
        --model-type groupmixformer --model-file groupmixformer.py --tag groupmixformer_small"""
    config = make_config(*shlex.split(command))
    assert (config.DATA.BATCH_SIZE, config.TAG, config.OUTPUT) == (64, "groupmixformer_small", "/out")
    assert config.MODEL.GMA.EMBEDDING_DIMS == [80, 160, 320, 320]


def test_no_new_flag_slips_in(monkeypatch):
    assert option_strings(monkeypatch) == FLAGS


def undocumented(flags: set[str], text: str) -> set[str]:
    return {flag for flag in flags if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)}


def test_every_flag_is_documented_in_the_readme(monkeypatch):
    flags = option_strings(monkeypatch) - {"-h", "--help"}
    assert not undocumented(flags, (ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_documentation_test_can_fail():
    text = "`--batch-size N` and --zip-level; --local_rank."
    flags = {"--batch-size", "--zip", "--local_rank", "--size"}
    assert undocumented(flags, text) == {"--zip", "--size"}
