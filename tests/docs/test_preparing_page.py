"""The page about preparing data: its commands run on small data sets of each form."""

import importlib
import re
import shlex

import pytest
import raw_data
import runs

PAGE = (runs.ROOT / "docs" / "preparing-data.md").read_text()
LINES = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
COMMANDS = [shlex.split(line) for line in LINES if line.startswith("python ")]
WRITERS = {
    "imagenet": raw_data.write_tars,
    "kaggle": raw_data.write_kaggle,
    "parquet": raw_data.write_shards,
    "split": raw_data.write_class_folders,
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_works(command, tmp_path):
    python, dash, module, form, *rest = command
    assert (python, dash, module) == ("python", "-m", "tools.prepare")
    WRITERS[form](tmp_path / "raw")
    places = {"<folder>": tmp_path / "raw", "<ImageNet>": tmp_path / "out", "<data>": tmp_path / "out"}
    places["<folder>/imagenet"] = tmp_path / "raw" / "imagenet"
    args = [str(places.get(word, word)) for word in rest]
    assert importlib.import_module("tools.prepare.__main__").main([form, *args]) == 0


def test_each_form_has_a_command():
    assert [command[3] for command in COMMANDS] == list(WRITERS)
    others = [line for line in LINES if not line.startswith(("python ", "#"))]
    assert others == ["pip install pyarrow"]  # tests/tools/test_prepare_images.py
