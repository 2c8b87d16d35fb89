"""The page about detection: its program runs, and what it names is there."""

import re

import pytest
import runs

PAGE = (runs.ROOT / "docs" / "detection.md").read_text()


@pytest.mark.launch
def test_rt_detr_of_the_page_trains(tmp_path):
    program = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    program += "assert all(p.grad is not None for p in network.parameters())\n"
    (tmp_path / "rt_detr.py").write_text(program)
    ended = runs.launch(str(tmp_path / "rt_detr.py"), [], env={"PYTHONPATH": str(runs.ROOT)})
    assert ended.returncode == 0, ended.stderr


def test_files_and_keys_of_the_page_exist():
    from tasks.detection.keys import KEYS

    for path in re.findall(r"configs/detection/[\w./]+\.yaml", PAGE):
        assert (runs.ROOT / path).is_file(), path
    own = {name.split(".")[0] for name in KEYS}
    for name in re.findall(r"\b((?:DATA|MODEL|TEST)\.[A-Z_]+)\b", PAGE):
        assert name in KEYS, (name, own)


def test_the_table_of_sizes_is_that_of_the_cards():
    for variant, letter in zip(("miny", "tiny", "small", "base"), "MTSB"):
        for detector in ("mask_rcnn", "faster_rcnn", "retinanet"):
            card = runs.ROOT / "configs" / "detection" / f"{detector}_groupmixformer_{variant}_1x.yaml"
            parameters, flops = re.search(r": ([\d.]+ M) parameters, ([\d.]+) GFLOPs", card.read_text()).groups()
            assert f"| {parameters} |" in PAGE and f"| {flops} |" in PAGE, (letter, detector)
