"""configs/recipes/: each card goes with each variant, and holds what it promises."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from configs import UserError, read_config
from tasks import keys_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VARIANTS = sorted(CONFIGS.glob("groupmixformer_[mtsbl]*[a-z].yaml"))
RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
NETWORK = ("EMBEDDING_DIMS", "SERIAL_DEPTHS", "MLP_RATIOS")
NO_MIXING = {"AUG.MIXUP": 0, "AUG.CUTMIX": 0}
AT_64 = {"DATA.BATCH_SIZE": 64, "TRAIN.RECIPE_BATCH": 64, "TRAIN.REFERENCE_BATCH": 64, "DATA.VAL_SHARE": 0.1}
PROMISED = {
    "fine_tuning": {
        **AT_64,
        **NO_MIXING,
        "TRAIN.EPOCHS": 30,
        "TRAIN.WARMUP_EPOCHS": 3,
        "TRAIN.LAYER_DECAY": 0.75,
        "MODEL.GMA.DROP_PATH_RATE": 0.1,
        "EMA.WARMUP": True,
    },
    "linear_probe": {
        **AT_64,
        **NO_MIXING,
        "TRAIN.FREEZE": "backbone",
        "TRAIN.WEIGHT_DECAY": 0,
        "AUG.AUTO_AUGMENT": "none",
        "AUG.REPROB": 0,
    },
    "deit3": {  # the published command of ViT-S, and defaults of its code
        "LOSS.NAME": "bce",
        "LOSS.BCE_THRESHOLD": 0,
        "MODEL.LABEL_SMOOTHING": 0,
        "MODEL.GMA.DROP_PATH_RATE": 0.05,
        "AUG.AUTO_AUGMENT": "3a",
        "AUG.COLOR_JITTER": 0.3,
        "AUG.REPROB": 0,
        "AUG.MIXUP": 0.8,
        "AUG.CUTMIX": 1,
        "DATA.REPEATS": 3,
        "TRAIN.OPTIMIZER.NAME": "lamb",
        "TRAIN.REFERENCE_BATCH": 2048,
        "TRAIN.BASE_LR": 4e-3,
        "TRAIN.WARMUP_LR": 1e-6,
        "TRAIN.MIN_LR": 1e-5,
        "TRAIN.WEIGHT_DECAY": 0.05,
        "TRAIN.EPOCHS": 800,
        "TRAIN.WARMUP_EPOCHS": 5,
    },
    "distillation": {
        "DISTILL.TEACHER": "regnety_160",
        "DISTILL.KIND": "hard",
        "DISTILL.WEIGHT": 0.5,
        "TRAIN.EPOCHS": 300,
        "TRAIN.BASE_LR": 5e-4,
    },
}


def read(*files: Path):
    weights = ["--opts", "DISTILL.WEIGHTS", "teacher.pth"] if files[-1].stem == "distillation" else []
    return read_config(["--cfg", *map(str, files), *weights], keys_of, notify=pytest.fail)


def value(config, name: str):
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_its_promises_with_every_variant(recipe, variant):
    config, alone = read(variant, recipe), read(variant)
    assert {name: value(config, name) for name in PROMISED[recipe.stem]} == PROMISED[recipe.stem]
    assert [config.MODEL.GMA[name] for name in NETWORK] == [alone.MODEL.GMA[name] for name in NETWORK]
    assert (variant.stem, recipe.stem) == (config.MODEL.NAME, config.TAG), "the run folder says both"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_its_own_command(recipe):
    lines = [line.removeprefix("#") for line in recipe.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    (command,) = (shlex.split(line) for line in text.splitlines() if " train.py " in line)
    config = read_config(command[command.index("train.py") + 1 :], keys_of, notify=pytest.fail)
    assert recipe.stem == config.TAG and config.MODEL.NAME == "groupmixformer_small"
    gpus = int(command[2]) if command[0] == "torchrun" else 1
    assert gpus * config.DATA.BATCH_SIZE == config.TRAIN.RECIPE_BATCH
    assert config.TRAIN.RECIPE_BATCH % config.DATA.REPEATS == 0, "which the order of samples needs"
    assert config.DATA.BATCH_SIZE % 2 == 0, "which mixup needs"


def test_every_recipe_and_every_variant_is_tested():
    assert {path.stem for path in RECIPES} == set(PROMISED)
    assert [path.stem[15:] for path in VARIANTS] == ["base", "large", "miny", "small", "tiny"]


def test_a_recipe_decides_all_augmentation_that_the_digits_turn_off():
    """configs/groupmixformer_digits.yaml holds a recipe too; as the first file it must not take augmentation away."""
    digits = yaml.safe_load((CONFIGS / "groupmixformer_digits.yaml").read_text())["AUG"]
    for recipe in RECIPES:
        own = yaml.safe_load(recipe.read_text()).get("AUG")
        assert own is None or set(digits) - {"COLOR_JITTER"} <= set(own), recipe.name


def test_later_files_win_each_after_its_base(tmp_path, make_config):
    for name, text in {
        "base.yaml": "SEED: 1\nTAG: base\nSAVE_FREQ: 5",
        "first.yaml": "BASE: base.yaml\nSEED: 2\nTAG: first",
        "second.yaml": "BASE: base.yaml\nTAG: second",
    }.items():
        (tmp_path / name).write_text(text)
    first, second = str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml")
    config = make_config("--cfg", first, second, "--opts", "SAVE_KEEP", "7")
    assert (config.SEED, config.TAG, config.SAVE_FREQ, config.SAVE_KEEP) == (1, "second", 5, 7)
    assert make_config("--cfg", second, first).TAG == "first"
    assert make_config("--cfg", second, "--cfg", first).SEED == 2, "a flag that is repeated replaces, as before"
    with pytest.raises(UserError, match=r"^stray: no such configuration file"):
        make_config("--cfg", first, "stray")


def test_only_the_length_of_a_later_file_takes_the_warmup_along(tmp_path, make_config):
    (tmp_path / "short.yaml").write_text("TRAIN: {EPOCHS: 80}")
    config = make_config("--cfg", str(CONFIGS / "recipes" / "deit3.yaml"), str(tmp_path / "short.yaml"))
    assert (config.TRAIN.EPOCHS, config.TRAIN.WARMUP_EPOCHS) == (80, 0.5)


def test_the_pages_of_recipes_name_each_card():
    page = (CONFIGS.parent / "docs" / "fine-tuning.md").read_text()
    assert {path.name for path in RECIPES} <= set(re.findall(r"configs/recipes/(\w+\.yaml)", page))
