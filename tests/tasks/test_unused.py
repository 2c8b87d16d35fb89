"""Keys that have no effect in a run are named in its log."""

import pytest
import runs

from tasks.classification.unused import unused_settings

TEACHER = ("DISTILL.TEACHER", "resnet18", "DISTILL.WEIGHTS", "weights.pth")


@pytest.mark.parametrize(
    ("name", "value", "without", "enough"),
    [
        ("DISTILL.KIND", "hard", (), TEACHER),
        ("DISTILL.WEIGHT", "0.7", (), TEACHER),
        ("DISTILL.TEMPERATURE", "3.0", (*TEACHER, "DISTILL.KIND", "hard"), TEACHER),
        ("LOSS.EFFECTIVE_BETA", "0.99", ("LOSS.CLASS_WEIGHTS", "balanced"), ("LOSS.CLASS_WEIGHTS", "effective")),
        ("DATA.SCALE_BATCH", "False", (), ("DATA.IMG_SIZE", "64", "DATA.TRAIN_SIZES", "[[48, 0]]")),
        ("AUG.REMODE", "const", ("AUG.REPROB", "0"), ()),
        ("AUG.MIXUP_MODE", "elem", ("AUG.MIXUP_PROB", "0"), ()),
        ("AUG.MIXUP_OFF_EPOCH", "1", ("AUG.MIXUP", "0", "AUG.CUTMIX", "0"), ()),
        ("AUG.MIXUP_OFF_EPOCH", "2", (), ("TRAIN.EPOCHS", "3")),
    ],
)
def test_what_has_no_effect_is_one_line(make_config, name, value, without, enough):
    lines = unused_settings(make_config("--opts", *runs.TINY, name, value, *without))
    assert [line for line in lines if line.startswith(name)] == lines[:1] and "; leave it out" in lines[0]
    assert unused_settings(make_config("--opts", *runs.TINY, name, value, *enough)) == []


@pytest.mark.parametrize("name", ["deit3", "fine_tuning", "linear_probe", "distillation"])
def test_recipes_have_nothing_unused(make_config, name):
    cfg = [runs.ROOT / "configs" / f"{file}.yaml" for file in ("groupmixformer_small", f"recipes/{name}")]
    weights = ("DISTILL.WEIGHTS", "w.pth") if name == "distillation" else ("TAG", "x")
    assert unused_settings(make_config("--cfg", *cfg, "--opts", *weights)) == []


def test_a_run_says_so(data, tmp_path, monkeypatch):
    assert runs.train_here(monkeypatch, runs.arguments(data, tmp_path, "AUG.MIXUP_OFF_EPOCH", "280"), stop_at=1) == 75
    log = (runs.run_folder(tmp_path) / "log_rank0.txt").read_text()
    assert "AUG.MIXUP_OFF_EPOCH = 280: has no effect: the run ends with TRAIN.EPOCHS = 2; leave it out" in log
