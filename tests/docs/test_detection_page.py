"""The page about detection: its program runs, and what it names is there."""

import importlib
import re
import shlex

import pytest
import runs

from configs import read_config
from tasks import keys_of
from tasks.detection.keys import KEYS

PAGE = (runs.ROOT / "docs" / "detection.md").read_text()


@pytest.mark.launch
def test_rt_detr_of_the_page_trains(tmp_path):
    program = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    program += "assert all(p.grad is not None for p in network.parameters())\n"
    (tmp_path / "rt_detr.py").write_text(program)
    ended = runs.launch(str(tmp_path / "rt_detr.py"), [], env={"PYTHONPATH": str(runs.ROOT)})
    assert ended.returncode == 0, ended.stderr


def commands(first: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if first in line]


def test_commands_of_the_page_are_read():
    for script in ("train.py", "test.py"):
        for line in commands(script):
            places = {"<YAML>": str(runs.ROOT / "configs" / "detection" / "digits.yaml")}
            args = [places.get(word, word) for word in line[line.index(script) + 1 :]]
            args = args if "--cfg" in args else ["--cfg", places["<YAML>"], *args]  # else a checkpoint holds it
            assert read_config(args, keys_of, notify=lambda line: None).TASK == "detection"
    (check,), (prepare,) = commands("tools.check"), commands("tools.prepare")
    assert all(name in PAGE for name in importlib.import_module("tools.check")._parse(check[3:]).cfg)
    assert prepare[3] in importlib.import_module("tools.prepare.annotations").READERS
    assert commands("bash") == [["bash", "launch_scripts/quickstart.sh", "detection"]]


def test_files_and_keys_of_the_page_exist():
    for path in re.findall(r"configs/detection/[\w./]+\.yaml", PAGE):
        assert (runs.ROOT / path).is_file(), path
    for name in re.findall(r"\b((?:DATA|MODEL|TEST)\.[A-Z_]+)\b", PAGE):
        assert name in KEYS, name


def test_the_table_of_sizes_is_that_of_the_cards():
    for variant, letter in zip(("miny", "tiny", "small", "base"), "MTSB"):
        for detector in ("mask_rcnn", "faster_rcnn", "retinanet"):
            card = runs.ROOT / "configs" / "detection" / f"{detector}_groupmixformer_{variant}_1x.yaml"
            parameters, flops = re.search(r": ([\d.]+ M) parameters, ([\d.]+) GFLOPs", card.read_text()).groups()
            assert f"| {parameters} |" in PAGE and f"| {flops} |" in PAGE, (letter, detector)
