"""The configuration of a run: where a value comes from, what is refused and in which words."""

import json
import re
from pathlib import Path

import pytest
import yaml

import tasks
from configs import UserError, read_command, read_config, with_num_classes
from configs.keys import KEYS, RETIRED_KEYS, recipe
from configs.load import flatten

ROOT = Path(__file__).resolve().parents[2]
CARDS = {**KEYS, **tasks.keys_of("classification")}
# Of the released configurations, and of config.json of our earlier runs.
RETIRED = {
    "MODEL.GMA.PATCH_SIZE": 4,
    "MODEL.GMA.PRETRAINED": False,
    "LOCAL_RANK": 0,
    "TEST.PREDICTIONS": "csv",
    "TEST.REAL_JSON": "",
}


def write_yaml(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(*words: str, keys_of=tasks.keys_of) -> str:
    """The message of the UserError that this command line ends in; it must be one line."""
    with pytest.raises(UserError) as caught:
        read_config(words, keys_of, notify=lambda line: None)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def empty(tmp_path: Path) -> str:
    """A YAML file without a key."""
    return write_yaml(tmp_path, "", "empty.yaml")


# --------------------------------------------------------------------------------------------------------------- tasks
TOYS = {
    "classification": {"AUG.FLIP": recipe(0.5, "probability of a flip")},
    "toy": {"TOY.SIZE": recipe(3, "size, pixels", flag="--toy-size"), "TRAIN.EPOCHS": recipe(30, "epochs in all")},
}


def test_task_decides_which_keys_and_flags_there_are(tmp_path, capsys):
    """The file, the file that it builds on, or --opts may name it; a task's card replaces a shared one."""
    base = write_yaml(tmp_path, "TASK: toy", "base.yaml")
    builds_on_it = write_yaml(tmp_path, "BASE: base.yaml")
    nothing = write_yaml(tmp_path, "", "nothing.yaml")
    for words in (["--cfg", base], ["--cfg", builds_on_it], ["--cfg", nothing, "--opts", "TASK", "toy"]):
        _, config, keys = read_command([*words, "--toy-size", "4"], TOYS.__getitem__)
        assert (config.TASK, config.TOY.SIZE, config.TRAIN.EPOCHS, "AUG" in config) == ("toy", 4, 30, False)
        assert set(keys) == set(KEYS) | set(TOYS["toy"])
    assert read_config(["--cfg", base, "--opts", "TASK", "classification"], TOYS.__getitem__).AUG.FLIP == 0.5
    for task, there in (("toy", True), ("classification", False)):
        with pytest.raises(SystemExit):
            read_command(["--help", "--opts", "TASK", task], TOYS.__getitem__)
        assert ("--toy-size" in capsys.readouterr().out) == there


def test_a_key_of_another_task_is_unknown(tmp_path):
    cfg = write_yaml(tmp_path, "TASK: toy")
    message = error_of("--cfg", cfg, "--opts", "AUG.FLIP", "1", keys_of=TOYS.__getitem__)
    assert message == "--opts: unknown key AUG.FLIP; TASK 'toy' has no such key"


def test_an_unknown_task_is_told_with_those_there_are(tmp_path):
    known = ", ".join(map(repr, tasks.TASKS))
    assert error_of("--cfg", write_yaml(tmp_path, "TASK: toy")) == f"TASK = 'toy': must be one of {known}"
    assert "TASK = ['toy']: must be text" in error_of("--cfg", write_yaml(tmp_path, "TASK: [toy]"))


# ---------------------------------------------------------------------------------------------------------- precedence
def test_later_sources_win(tmp_path, make_config):
    write_yaml(tmp_path, "TRAIN: {EPOCHS: 100, WARMUP_EPOCHS: 11, CLIP_GRAD: 1.0, ACCUMULATION_STEPS: 2}", "base.yaml")
    text = "BASE: base.yaml\nTRAIN: {WARMUP_EPOCHS: 12, CLIP_GRAD: 2.0, ACCUMULATION_STEPS: 3}"
    cfg = write_yaml(tmp_path, text)
    opts, flag = ["--opts", "TRAIN.CLIP_GRAD", "3", "TRAIN.ACCUMULATION_STEPS", "4"], ["--accumulation-steps", "5"]
    for words in ([*opts, *flag], [*flag, *opts]):
        train = make_config("--cfg", cfg, *words).TRAIN
        assert train.WEIGHT_DECAY == 0.05, "default"
        assert train.EPOCHS == 100, "BASE before the default"
        assert train.WARMUP_EPOCHS == 12, "the file before BASE"
        assert train.CLIP_GRAD == 3.0, "--opts before the file"
        assert train.ACCUMULATION_STEPS == 5, "a flag before --opts, wherever it stands"


def test_repeated_opts_add_up(empty, make_config):
    first, second = ["TRAIN.EPOCHS", "50", "SAVE_FREQ", "2"], ["SEED", "3", "TRAIN.EPOCHS", "60"]
    config = make_config("--cfg", empty, "--opts", *first, "--opts", *second)
    assert (config.SAVE_FREQ, config.SEED, config.TRAIN.EPOCHS) == (2, 3, 60)
    assert make_config("--cfg", empty).TRAIN.EPOCHS == 300, "one command line must not reach the next"


@pytest.mark.parametrize("bases", ["b.yaml", "['', b.yaml]"])
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
    for folder in ("common", "mine"):
        (tmp_path / folder).mkdir()
    write_yaml(tmp_path / "common", "TAG: deeper", "deeper.yaml")
    write_yaml(tmp_path / "common", "BASE: deeper.yaml", "base.yaml")
    write_yaml(tmp_path / "mine", "BASE: ../common/base.yaml")
    monkeypatch.chdir(tmp_path / "mine")
    assert make_config("--cfg", "run.yaml").TAG == "deeper"


def test_wrong_base(tmp_path, empty):
    write_yaml(tmp_path, "BASE: b.yaml", "a.yaml")
    write_yaml(tmp_path, "BASE: a.yaml", "b.yaml")
    assert "BASE leads back" in error_of("--cfg", str(tmp_path / "a.yaml"))
    for base in ("5", "{a: b}", "[1]"):
        assert "run.yaml: BASE = " in error_of("--cfg", write_yaml(tmp_path, f"BASE: {base}"))
    assert "BASE" in error_of("--cfg", empty, "--opts", "BASE", "x.yaml")
    message = error_of("--cfg", write_yaml(tmp_path, "BASE: emty.yaml"))
    assert message == f"{tmp_path / 'emty.yaml'}: no such configuration file; did you mean {empty}?"


def test_switched_on_in_a_file_stays_on_without_the_flag(tmp_path, make_config):
    """A flag that is not given must not bring back its default over what the file says."""
    text = "DATA: {ZIP_MODE: True, BATCH_SIZE: 6}\nAMP_OPT_LEVEL: O0"
    config = make_config("--cfg", write_yaml(tmp_path, text))
    assert (config.DATA.ZIP_MODE, config.DATA.BATCH_SIZE, config.AMP_OPT_LEVEL) == (True, 6, "O0")


# --------------------------------------------------------------------------------------------------------------- types
@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.BASE_LR", "5e-4", 5e-4),  # YAML 1.1 takes a float without a dot for text
        ("TRAIN.CLIP_GRAD", "5", 5.0),
        ("TRAIN.EPOCHS", "'100'", 100),
        ("TRAIN.AUTO_RESUME", "'False'", False),
        ("TRAIN.USE_CHECKPOINT", "true", True),
        ("AUG.CUTMIX_MINMAX", "None", None),
        ("AUG.CUTMIX_MINMAX", "'(0.2, 0.8)'", [0.2, 0.8]),
        ("MODEL.GMA.QKV_SCALE", "null", None),
        ("MODEL.GMA.QKV_SCALE", "0.125", 0.125),
        ("TRAIN.OPTIMIZER.BETAS", "[0.9, 0.95]", (0.9, 0.95)),
        ("TRAIN.OPTIMIZER.BETAS", "[0, 0.5]", (0.0, 0.5)),
        ("MODEL.GMA.EMBEDDING_DIMS", "[40, 80, 160, 160]", [40, 80, 160, 160]),
        ("MODEL.GMA.MLP_RATIOS", "[4, 3.5, 4, 2]", [4, 3.5, 4, 2]),
        ("DATA.IMG_SIZE", "256", 256),
        ("DATA.IMG_SIZE", "[192, 256]", [192, 256]),
        ("DATA.IMG_SIZE", "[256, 256]", 256),
        ("TAG", "2024", "2024"),
        ("TAG", "'None'", "None"),
    ],
)
def test_value_takes_the_type_of_the_default(tmp_path, make_config, empty, key, text, value):
    for words in (["--cfg", write_yaml(tmp_path, f"{key}: {text}")], ["--cfg", empty, "--opts", key, text.strip("'")]):
        result = dict(flatten(make_config(*words)))[key]
        assert result == value and type(result) is type(value)


def test_null_is_empty_text(tmp_path, make_config):
    assert make_config("--cfg", write_yaml(tmp_path, "OUTPUT: null")).OUTPUT == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.BATCH_SIZE", "64.0"),
        ("DATA.BATCH_SIZE", "true"),
        ("DATA.ZIP_MODE", "1"),
        ("TRAIN.BASE_LR", "fast"),
        ("TRAIN.BASE_LR", ".nan"),
        ("TRAIN.BASE_LR", "9" * 400),
        ("TRAIN.CLIP_GRAD", "null"),
        ("TRAIN.OPTIMIZER.BETAS", "0.9"),
        ("TRAIN.OPTIMIZER.BETAS", "[a, b]"),
        ("MODEL.GMA.EMBEDDING_DIMS", "[80, 160, 320, 320.5]"),
        ("AUG.CUTMIX_MINMAX", "0.5"),
        ("DATA.IMG_SIZE", "[192, 256, 3]"),
        ("DATA.IMG_SIZE", "[192.0, 256]"),
        ("DATA.IMG_SIZE", "true"),
        ("TAG", "[a]"),
        ("MODEL", "5"),
    ],
)
def test_wrong_type_is_told_with_file_key_and_value(tmp_path, key, value):
    path = write_yaml(tmp_path, f"{key}: {value}")
    assert error_of("--cfg", path).startswith(f"{path}: {key} = {yaml.safe_load(value)!r}: ")


# -------------------------------------------------------------------------------------------------- unknown, impossible
@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("DATA.BACH_SIZE", "DATA.BATCH_SIZE"),
        ("train.epochs", "TRAIN.EPOCHS"),
        ("SAVEFREQ", "SAVE_FREQ"),
        ("TRAIN.LR", "TRAIN.BASE_LR"),
        ("LEARNING_RATE", "TRAIN.BASE_LR"),
        ("TRAIN.WARMUP", "TRAIN.WARMUP_EPOCHS"),
        ("TRAIN.BATCH_SIZE", "DATA.BATCH_SIZE"),
        ("MODEL.NUM_CLASSES", "MODEL.GMA.NUM_CLASSES"),
    ],
)
def test_unknown_key_is_told_with_its_place_and_the_nearest_one(tmp_path, empty, key, suggestion):
    path = write_yaml(tmp_path, f"{key}: 3")
    assert error_of("--cfg", path) == f"{path}: unknown key {key}; did you mean {suggestion}?"
    assert error_of("--cfg", empty, "--opts", key, "3") == f"--opts: unknown key {key}; did you mean {suggestion}?"


# One value for each rule that is not told by its words, and for one at_least and one_of.
IMPOSSIBLE = [
    ("DATA.BATCH_SIZE", "0"),
    ("DATA.CACHE_MODE", "all"),
    ("MODEL.NAME", "a/b"),
    ("MODEL_FILE", 201 * "x"),
    ("TAG", ""),
    ("MODEL.LABEL_SMOOTHING", "1.0"),
    ("MODEL.GMA.IN_DIM", "2"),
    ("MODEL.GMA.EMBEDDING_DIMS", "[]"),
    ("MODEL.GMA.EMBEDDING_DIMS", "[80, 160, 0, 320]"),
    ("MODEL.GMA.SERIAL_DEPTHS", "[2, 4, 12, 4, 4]"),
    ("MODEL.GMA.GROUP_SIZES", "[3, 4]"),
    ("MODEL.GMA.GROUP_SIZES", "[1]"),
    ("TRAIN.START_EPOCH", "300"),
    ("TRAIN.WARMUP_EPOCHS", "300"),
    ("TRAIN.WARMUP_UPDATES", "-1"),
    ("TRAIN.LR_SCHEDULER.NAME", "multistep"),
    ("TRAIN.LR_SCHEDULER.MILESTONES", "[8, 8]"),
    ("TRAIN.LR_SCHEDULER.MILESTONES", "[200, 300]"),
    ("TRAIN.LAYER_DECAY", "0.0"),
    ("TRAIN.LAYER_DECAY", "1.1"),
    ("TRAIN.BASE_LR", "0.0"),
    ("TRAIN.BASE_LR", "-0.0005"),
    ("TRAIN.BASE_LR", "1e-07"),
    ("TRAIN.OPTIMIZER.BETAS", "(0.9, 1.0)"),
    ("TRAIN.OPTIMIZER.BETAS", "(0.9,)"),
    ("AUG.HFLIP", "1.5"),
    ("AUG.CUTMIX_MINMAX", "[0.8, 0.2]"),
    ("TEST.SIZES", "[224, 16]"),
    ("DATA.IMG_SIZE", "31"),
    ("DATA.IMG_SIZE", "32769"),
    ("DATA.IMG_SIZE", "[224, 31]"),
    ("TRAIN.FREEZE", "9"),
    ("LOSS.CLASS_WEIGHTS", "[0, 0]"),
    ("LOSS.BCE_THRESHOLD", "0.5"),  # without LOSS.NAME bce
    ("DISTILL.TEACHER", "resnet18"),  # without a file of its weights
    ("DISTILL.WEIGHTS", "weights.pth"),  # without a teacher
    ("DATA.TRAIN_SIZES", "[[128, 1]]"),
    ("SEED", str(2**63)),  # torch could not take it
]


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_impossible_value_is_told_with_key_and_value(empty, key, value):
    message = error_of("--cfg", empty, "--opts", key, value)
    assert any(message.startswith(f"{key} = {form}: ") for form in (value, repr(value)))


def test_every_rule_has_a_case():
    """A rule that nobody tries may refuse everything, or nothing."""
    tried = {id(rule) for key, _ in IMPOSSIBLE for rule in CARDS[key].rules}
    untried = {rule.demand for key in CARDS.values() for rule in key.rules if id(rule) not in tried}
    generic = r"must (be (at least \d+|one of |two numbers between)|lie between \d)|needs (TEST.CROP True|every image)"
    generic += r"|the compiler chooses|images of label files|EPS and BETAS"  # tried where they belong
    assert all(re.match(generic, demand) for demand in untried)


def test_the_compiler_has_no_selective_checkpoints(empty):
    message = error_of("--cfg", empty, "--compile", "--use-checkpoint", "selective")
    assert message.startswith("TRAIN.USE_CHECKPOINT = 'selective': ") and message.endswith("set COMPILE_MEMORY instead")


def test_five_crops_need_cropping(empty):
    message = error_of("--cfg", empty, "--tta", "five-crop", "--opts", "TEST.CROP", "False")
    assert message.startswith("TEST.TTA = 'five-crop': needs TEST.CROP True")


@pytest.mark.parametrize(
    ("key", "value", "length"),
    [("TRAIN.WARMUP_UPDATES", "50", "UPDATES = 50"), ("TRAIN.LR_SCHEDULER.MILESTONES", "[20, 50]", "UPDATES = 50")],
)
def test_a_length_in_updates_is_what_the_rest_must_fit(empty, make_config, key, value, length):
    """TRAIN.EPOCHS decides nothing then, and neither does a warm-up in epochs beside one in updates."""
    opts = ["TRAIN.EPOCHS", "10", "TRAIN.WARMUP_UPDATES", "5", "TRAIN.UPDATES"]
    message = error_of("--cfg", empty, "--opts", *opts, "50", key, value)
    assert message.startswith(f"{key} = {value}: must be less than ") and length in message
    assert make_config("--cfg", empty, "--opts", *opts, "51", key, value).TRAIN.WARMUP_EPOCHS == 20


def test_a_negative_number_is_no_flag(empty):
    assert error_of("--cfg", empty, "--opts", "TRAIN.MIN_LR", "-1e-3").startswith("TRAIN.MIN_LR = -0.001: ")


def test_opts_need_pairs(empty):
    message = error_of("--cfg", empty, "--opts", "SEED", "1", "TRAIN.EPOCHS")
    assert message == "--opts takes pairs of KEY and VALUE, but 'TRAIN.EPOCHS' has no value"


# ---------------------------------------------------------------------------------------------------------- YAML files
@pytest.mark.parametrize(
    "text",
    [
        "TRAIN: [",
        "- 1\n- 2",
        "---\nSEED: 1\n---\nSEED: 2",
        "SEED: !unknown 3",
        "MODEL: &m {GMA: *m}",
        "TRAIN: {EPOCHS: 50}\nTRAIN: {BASE_LR: 1.0}",
        "TRAIN:\n  EPOCHS: 50\n  EPOCHS: 60",
        "SEED: \x00",
    ],
)
def test_broken_yaml_is_one_line_that_names_the_file(tmp_path, text):
    path = write_yaml(tmp_path, text)
    assert error_of("--cfg", path).startswith(path)


def test_missing_and_unreadable_file(tmp_path, monkeypatch):
    near = f"no such configuration file; did you mean {ROOT}/configs/groupmixformer_small.yaml?"
    assert near in error_of("--cfg", f"{ROOT}/configs/groupmixformer_smal.yaml")
    small = f"{ROOT}/configs/groupmixformer_small.yaml"
    monkeypatch.chdir(tmp_path)  # what is suggested works from here, and is there
    assert error_of("--cfg", "groupmixformer_smal.yaml").endswith(f"; did you mean {small}?")
    (tmp_path / "groupmixformer_smal1.yaml").symlink_to("nowhere")
    assert error_of("--cfg", "groupmixformer_smal.yaml").endswith(f"; did you mean {small}?")
    monkeypatch.chdir(ROOT)
    assert error_of("--cfg", "groupmixformer_smal.yaml").endswith("; did you mean configs/groupmixformer_small.yaml?")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "binary.yaml", tmp_path):
        assert str(path) in error_of("--cfg", str(path))


def test_yaml_tags_run_nothing(tmp_path):
    proof = tmp_path / "proof"
    message = error_of("--cfg", write_yaml(tmp_path, f"TAG: !!python/object/apply:os.system ['touch {proof}']"))
    assert "python" in message and not proof.exists()


def test_merge_keys_and_anchors_work(tmp_path, make_config):
    text = "TRAIN:\n  <<: &common {EPOCHS: 50, WARMUP_EPOCHS: 5}\n  WARMUP_EPOCHS: 6\n"
    train = make_config("--cfg", write_yaml(tmp_path, text)).TRAIN
    assert (train.EPOCHS, train.WARMUP_EPOCHS) == (50, 6)


def test_yaml_files_of_the_repository_load_without_a_notice():
    """Each has a run folder of its own, named like the file."""
    notices = []
    files = sorted((ROOT / "configs").glob("*.yaml"))
    names = [read_config(["--cfg", str(path)], tasks.keys_of, notices.append).MODEL.NAME for path in files]
    assert not notices
    assert names == [path.stem for path in files] and len(names) >= 6


def test_config_json_round_trip(tmp_path, make_config):
    from utils.session import describe_run

    opts = ["TRAIN.WARMUP_LR", "5e-7", "AUG.CUTMIX_MINMAX", "[0.2,0.8]", "TRAIN.OPTIMIZER.BETAS", "(0.9,0.95)"]
    config = make_config("--tag", "très long", "--data-path", "1e3", "--zip", "--opts", *opts)
    describe_run(config, tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    assert dict(flatten(make_config("--cfg", str(tmp_path / "config.json")))) == dict(flatten(config))


def test_with_num_classes_leaves_the_configuration_alone(make_config):
    config = make_config()
    other = with_num_classes(config, 7)
    assert (config.MODEL.GMA.NUM_CLASSES, other.MODEL.GMA.NUM_CLASSES) == (1000, 7)
    assert config.is_frozen() and other.is_frozen()


@pytest.mark.parametrize("through", ["file", "nested file", "--opts"])
def test_retired_keys_are_accepted_with_one_notice_and_no_effect(tmp_path, through):
    assert set(RETIRED_KEYS) == set(RETIRED)
    text = {"file": yaml.safe_dump(RETIRED, sort_keys=False), "--opts": ""}
    text["nested file"] = (
        "MODEL: {GMA: {PATCH_SIZE: 4, PRETRAINED: false}}\nLOCAL_RANK: 0\nTEST: {PREDICTIONS: csv, REAL_JSON: ''}"
    )
    pairs = [str(word) for pair in RETIRED.items() for word in pair]
    notices = []
    words = ["--cfg", write_yaml(tmp_path, text[through]), *(["--opts", *pairs] if through == "--opts" else [])]
    config = read_config(words, tasks.keys_of, notices.append)
    assert len(notices) == len(RETIRED)
    assert all(f"{key} is ignored" in line for key, line in zip(RETIRED, notices))
    assert dict(flatten(config)) == {name: key.default for name, key in CARDS.items()}


def test_a_cache_mode_without_zip_files_is_told(empty):
    for flags, told in ((["--cache-mode", "full"], 1), (["--cache-mode", "full", "--zip"], 0), ([], 0)):
        notices = []
        read_config(["--cfg", empty, *flags], tasks.keys_of, notices.append)
        assert len(notices) == told and all("--cache-mode has no effect without --zip" in line for line in notices)
