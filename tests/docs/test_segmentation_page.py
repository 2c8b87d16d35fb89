"""The page about segmentation: its commands and its program work, and what it names is there."""

import re
import shlex

import pytest
import runs

from configs import read_config
from tasks import keys_of

PAGE = (runs.ROOT / "docs" / "segmentation.md").read_text()
LINES = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ").splitlines()
CARDS = sorted((runs.ROOT / "configs" / "segmentation").glob("*_ade20k.yaml"))


@pytest.mark.parametrize("line", LINES + [card.read_text() for card in CARDS if "_groupmixformer_" in card.name])
def test_commands_of_the_page_and_of_the_cards_are_valid(line):
    words = shlex.split(line.partition("\nBASE")[0].replace("#", " ").replace("\\\n", " "))
    script = "train.py" if "train.py" in words else "test.py"
    config = read_config(words[words.index(script) + 1 :], keys_of, notify=pytest.fail)
    assert config.TASK == "segmentation" and config.DATA.DATA_PATH == "<ADE20K>"
    assert f"configs/segmentation/{config.MODEL.NAME}.yaml" in words


def test_keys_of_the_page_exist():
    keys = keys_of("segmentation")
    from configs.keys import KEYS

    for name in re.findall(r"`((?:DATA|MODEL|TEST|TRAIN|AUG)\.[A-Z_]+)", PAGE):
        assert name in keys or name in KEYS, name


def test_the_sizes_of_the_page_are_those_of_the_cards():
    for card in CARDS:
        if found := re.search(r"classes: ([\d.]+) M parameters, ([\d.]+) GFLOPs", card.read_text()):
            assert f"{found[1]} M, {found[2]}" in PAGE, card.name


@pytest.mark.launch
def test_mask2former_of_the_page_trains(tmp_path):
    program = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    program += "assert all(p.grad is not None for p in network.model.pixel_level_module.encoder.parameters())\n"
    (tmp_path / "mask2former.py").write_text(program)
    ended = runs.launch(str(tmp_path / "mask2former.py"), [], env={"PYTHONPATH": str(runs.ROOT)})
    assert ended.returncode == 0, ended.stderr
