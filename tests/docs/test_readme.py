"""README.md and docs/: every command, link, named file and example, and the tests that hold the promises."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
import runs
import timm
import torch
import yaml
from ranks import in_fork

import models  # noqa: F401 - registers the variants with timm
from configs import read_config, with_num_classes
from configs.load import to_dict
from tasks import keys_of
from tasks.classification import evaluation as run
from tasks.networks import build_model
from tools import list_keys

README = (runs.ROOT / "README.md").read_text()
OWN_TESTS = ("detection.md", "segmentation.md", "preparing-data.md", "fine-tuning.md")  # tests/docs/test_<...>_page.py
NAMED = sorted(page for page in (runs.ROOT / "docs").glob("*.md") if page.name not in OWN_TESTS)
PAGES = [README, *(page.read_text() for page in NAMED)]
ALL_PAGES = [runs.ROOT / "README.md", *sorted((runs.ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.strip().startswith("#")
]


def script_arguments(command):
    """What train.py or test.py gets: everything after its name, placeholders replaced."""
    script = next(word for word in command if word in ("train.py", "test.py"))
    return script, command[command.index(script) + 1 :]


# Those of other tasks need other data: the tests of their pages have them.
OTHER_TASKS = re.compile(r"configs/(detection|segmentation)/|<YAML>")
PYTHON_COMMANDS = [c for c in COMMANDS if {"train.py", "test.py"} & set(c) and not OTHER_TASKS.search(" ".join(c))]


@pytest.mark.parametrize("command", PYTHON_COMMANDS, ids=" ".join)
def test_commands_of_both_scripts_work(command, image_folder, tmp_path, monkeypatch):
    """Run as they stand, but for paths, on one process and with a network that trains in a second."""
    script, rest = script_arguments(command)
    released = tmp_path / "weights.pth"
    tiny = [*runs.TINY, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    smaller = ["--batch-size", "4", "--output", str(tmp_path), "--opts", *tiny]
    config = with_num_classes(read_config(runs.arguments(image_folder, tmp_path), keys_of), 3)
    checkpoint = {"model": build_model(config).state_dict(), "config": yaml.safe_dump(to_dict(config))}
    torch.save(checkpoint, released)
    quickstart = "output/groupmixformer_digits/quickstart/ckpt_best.pth"
    places = {"datasets/digits": str(image_folder), quickstart: str(released)}
    places |= {
        "<ImageNet>": str(image_folder),
        "<photographs>": str(image_folder),
        "<checkpoint>": str(released),
        "groupmixformer_small.pth": str(released),
    }
    picture = next((image_folder / "val").rglob("*.png"))
    places |= {"<picture>": str(picture), "<folder>": str(picture.parent), "224": "32", "256": "48", "288": "64"}
    args = [places.get(word, word) for word in rest] + smaller
    if script == "train.py":
        assert runs.train_here(monkeypatch, args) == 0
        assert list(tmp_path.glob("tiny/*/ckpt_best.pth"))
        assert not list(tmp_path.glob("tiny/*/evaluation")), "validation within training writes none of test.py's files"
    else:
        monkeypatch.setattr(sys, "argv", ["test.py", *args])
        results = []
        evaluate = run.evaluate_weights
        monkeypatch.setattr(run, "evaluate_weights", lambda *a: results.append(evaluate(*a)))
        run.evaluate(evaluation_session())
        if "--images" in args:
            assert len(list(picture.parent.glob("*.png.top5.json"))) == 2
        else:
            assert {result["counted"] for result in results[0]} == {6}
            assert len(list(tmp_path.glob("tiny/*/evaluation/*/predictions.csv"))) == len(results[0])


def evaluation_session():
    from utils.session import start_session

    return start_session("", keys_of)


QUICK_MODULES = (
    *("tools.check", "tools.compare", "tools.report"),
    *("tools.convert", "tools.curves", "tools.visualize"),
)
MODULE_COMMANDS = [c for c in COMMANDS if c[1:2] == ["-m"] and c[2] in QUICK_MODULES]


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory):
    """The folder of a run of one epoch, and that of its evaluation."""
    output = tmp_path_factory.mktemp("finished")
    args = runs.arguments(data, output, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    with pytest.MonkeyPatch.context() as patch:
        assert runs.train_here(patch, args) == 0
        folder = runs.run_folder(output)
        patch.setattr(sys, "argv", ["test.py", *args, "MODEL.RESUME", str(folder / "ckpt_best.pth")])
        run.evaluate(evaluation_session())
    return folder, next(folder.glob("evaluation/*"))


@pytest.mark.parametrize("command", MODULE_COMMANDS, ids=" ".join)
def test_commands_of_modules_work(command, finished_run, data, tmp_path, monkeypatch):
    """Run as they stand, but for paths, on a run of the tiny network."""
    folder, evaluation = finished_run
    default = "output/groupmixformer_small/default"
    places = {"<ImageNet>": data, "DIR": data, default: folder, "output/groupmixformer_small/other": folder}
    places |= {f"{name}/predictions.csv": evaluation / "predictions.csv" for name in "AB"}
    places |= {f"{default}/evaluation/NAME": evaluation, "a.jpg": next((data / "val").rglob("*.png"))}
    places |= dict.fromkeys(("FILE", "<checkpoint>"), folder / "ckpt_best.pth") | {"3": "2"}  # the last stage
    args = [str(places.get(word, runs.ROOT / word if word.startswith("configs/") else word)) for word in command[3:]]
    monkeypatch.chdir(tmp_path)  # most write to the folder that they are started in
    assert importlib.import_module(command[2]).main(args + ["--opts", *runs.TINY] * ("--cfg" in args)) == 0


SHELL_SCRIPTS = [c for c in COMMANDS if c[0] == "bash"]


@pytest.mark.parametrize("command", SHELL_SCRIPTS, ids=" ".join)
def test_shell_scripts_exist_and_explain_themselves(command):
    result = subprocess.run([*command[:2], "--help"], cwd=runs.ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and command[1] in result.stdout


def test_the_multi_node_command():
    (command,) = (c for c in COMMANDS if "multi_machine_start.py" in c)
    places = {"<address of node 0>": "127.0.0.1", "<ImageNet>": "imagenet", "python": sys.executable}
    line = " ".join(command).replace("<address of node 0>", "127.0.0.1")
    words = [places.get(word, word) for word in line.split()]
    words.insert(words.index("--"), "--dry_run")
    result = subprocess.run(words, cwd=runs.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "torch.distributed.run" in result.stdout and "--opts TRAIN.EPOCHS 300" in result.stdout


def test_every_command_is_one_that_is_tested_or_named_here():
    tested = [*PYTHON_COMMANDS, *MODULE_COMMANDS, *SHELL_SCRIPTS]
    others = [c for c in COMMANDS if c not in tested]
    under_slurm = [c for c in others if "sbatch" in c]  # tests/processes/test_slurm.py
    assert all("launch_scripts/slurm_train.sh" in c for c in under_slurm)
    assert sorted(" ".join(c[:3]) for c in others if c not in under_slurm) == [
        "pip install -r",  # launch_scripts/setup_env.sh does it
        "pip install .",  # tests/model/test_reuse.py
        "pip install ./<folder>",  # tests/tools/test_hub.py
        "python -m tools.benchmark",  # tests/tools/test_benchmark.py
        "python -m tools.export",  # tests/tools/test_export.py
        "python multi_machine_start.py --machine_num",
        "torchrun --nproc_per_node 8",  # test_detection_page.py
        "torchrun --nproc_per_node 8",  # test_segmentation_page.py
    ]
    assert {command[2] for command in MODULE_COMMANDS} == set(QUICK_MODULES)


@every_page
def test_no_command_stands_outside_a_bash_block(page):
    fences = re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page.read_text(), re.MULTILINE)
    lines = [line for language, block in fences if language != "bash" for line in block.splitlines()]
    starts = ("python ", "python3 ", "bash ", "pip ", "torchrun ", "sbatch ")
    commands = [line for line in lines if line.startswith(starts)]
    assert all("<clone of timm>/validate.py" in line for line in commands), "which no test can run"


@pytest.mark.parametrize("page", ["README.md", "docs/backbone.md"])
def test_the_python_example(page):
    """In a fork: it registers the variants under another module's name."""
    example = re.findall(r"```python\n(.*?)```", (runs.ROOT / page).read_text(), re.DOTALL)[0]

    def follow():
        sys.path.insert(0, str(runs.ROOT / "models"))  # as where `pip install .` puts the one module
        names = {}
        exec(example, names)
        maps = names["backbone"](torch.zeros(1, 3, 64, 96))
        assert [64 // m.shape[2] for m in maps] == [4, 8, 16, 32] == [96 // m.shape[3] for m in maps]
        assert names["classifier"](torch.zeros(1, 3, 64, 64)).shape == (1, 10)

    status, text = in_fork(follow)
    assert status == 0, text


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


def anchors(page):
    """GitHub's names for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_the_model_zoo_counts():
    rows = re.findall(r"\| GroupMixFormer-\w \| `(\w+)\.yaml` \| ([\d,]+) \|", README)
    assert len(rows) == 5
    for name, parameters in rows:
        network = timm.create_model(name)
        assert sum(p.numel() for p in network.parameters()) == int(parameters.replace(",", ""))


def promised_tests():
    """{promise: the tests that hold it, as `file::test`}, from the table of docs/reliability.md."""
    page = (runs.ROOT / "docs" / "reliability.md").read_text()
    table = page[page.index("| promise |") :].partition("\n\n")[0].splitlines()[2:]
    promises = {}
    for row in table:
        name, _, cell = row.strip("|").split("|")
        for file, names in re.findall(r"`(tests/[\w/]+\.py)`: ((?:`test_\w+`,? ?)+)", cell):
            promises.setdefault(name.strip(), []).extend(f"{file}::{test}" for test in re.findall(r"test_\w+", names))
    assert len(promises) == len(table), "a promise names no test"
    return promises


def test_every_promise_is_held_on_every_push():
    """.ci/run collects each test that the table names."""
    assert "run_tests.sh --ci" in (runs.ROOT / ".ci" / "run").read_text()
    (selection,) = re.findall(
        r'--ci\) selection=\(-m "(.*)"\)', (runs.ROOT / "launch_scripts/run_tests.sh").read_text()
    )
    named = [test for tests in promised_tests().values() for test in tests]
    collect = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", selection, *named]
    status, text = in_fork(lambda: (os.chdir(runs.ROOT), sys.exit(pytest.main(collect))))
    assert status == 0, text
    collected = {line.partition("[")[0] for line in text.splitlines()}
    assert set(named) <= collected, f"not collected: {sorted(set(named) - collected)}"


def test_the_page_of_the_keys_is_that_of_the_cards():
    written = (runs.ROOT / "docs" / "configuration.md").read_text()
    assert written == list_keys.page(), "run: python -m tools.list_keys --out docs/configuration.md"


@every_page
def test_every_file_that_is_named_exists(page):
    for path in re.findall(
        r"`((?:launch_scripts|models|configs|data|tasks|tests|tools|utils|pretrained)/[\w./]+\.\w+)`", page.read_text()
    ):
        own = path.endswith(".pth") or path.startswith("tasks/brightness/")  # the reader's
        assert (runs.ROOT / path).is_file() or own, path
