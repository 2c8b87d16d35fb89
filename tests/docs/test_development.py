"""What docs/development.md says: the task of its example trains, and every place that it names exists."""

import json
import re
import sys
from types import ModuleType

import pytest
import runs

import tasks
from utils.checkpoint import load_file
from utils.session import start_session

PAGE = (runs.ROOT / "docs" / "development.md").read_text()


def test_the_documented_task_trains_and_is_evaluated(tmp_path, monkeypatch, capsys):
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
    best = load_file(folder / "ckpt_best.pth")
    monkeypatch.setattr(sys, "argv", ["test.py", *args, "--resume", str(folder / "ckpt_best.pth")])
    tasks.evaluate(start_session("", tasks.keys_of))
    shown = re.search(r"(\w+) weights of .*: {'error': ([\d.]+)}", capsys.readouterr().out)
    assert (shown[1], float(shown[2])) == (best["best_weights"], pytest.approx(best["max_accuracy"]))


def test_every_place_that_the_page_names_exists():
    table = PAGE.partition("## Where things are decided")[2].partition("## A task")[0]
    paths = re.findall(r"`((?:configs|data|models|tasks|utils)/[\w./]*)`", table)
    assert len(paths) > 10
    for path in paths:
        assert (runs.ROOT / path).exists(), path
    for name, path in re.findall(r"`(\w+)` in `([\w./]+)`", table):
        assert re.search(rf"^(def )?{name}\b", (runs.ROOT / path).read_text(), re.MULTILINE), f"{name} in {path}"
