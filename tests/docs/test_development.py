"""What docs/development.md says: the task of its example trains, and every place that it names exists."""

import json
import re
import sys
from types import ModuleType

import runs

import tasks

PAGE = (runs.ROOT / "docs" / "development.md").read_text()


def test_the_documented_task_trains(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (configuration,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    module = ModuleType("documented_task")
    exec(compile(code, "docs/development.md", "exec"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(tasks.TASKS, "brightness", module.__name__)
    cfg = tmp_path / "brightness.yaml"
    cfg.write_text(configuration)
    args = ["--cfg", str(cfg), "--output", str(tmp_path)]
    assert runs.train_here(monkeypatch, args) == 0
    folder = tmp_path / "brightness" / "default"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (table,) = re.findall(r"one JSON object a line.*?\n\n(.*?)\n\n", PAGE, re.DOTALL)
    names = {name for row in table.splitlines()[2:] for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    names -= {"train_<part>", "<number>_raw", "<number>_ema"}
    assert set(lines[0]) == names | {"train_bias", "error_raw", "error_ema"}
    assert lines[-1]["error_raw"] < lines[0]["error_raw"]
    assert (folder / "ckpt_best.pth").exists()


def test_every_place_that_the_page_names_exists():
    table = PAGE.partition("## Where things are decided")[2].partition("## A task")[0]
    paths = re.findall(r"`((?:configs|data|models|tasks|utils)/[\w./]*)`", table)
    assert len(paths) > 10
    for path in paths:
        assert (runs.ROOT / path).exists(), path
    for name, path in re.findall(r"`(\w+)` in `([\w./]+)`", table):
        assert re.search(rf"^(def )?{name}\b", (runs.ROOT / path).read_text(), re.MULTILINE), f"{name} in {path}"
